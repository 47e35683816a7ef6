"""How far apart a defence ends on one victim, over the order of its batches: seeds of victims do not show it alone.

    python benchmarks/streams.py results/desk/images/victims/cifar10/resnet18/fst/blended@0.01/seed0 [...] [--defences ft fst]
                                 [--budget heldout] [--streams 8] [--precisions bf16 fp32] [--out benchmarks/streams.json]

Each stream draws its own order of batches, augmentation and new head; victim, clean images and test images stay. Where the
victim lies says its scale and settings. Precisions are of the defence; all networks are measured in the recipe's.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.cells import read_tensors
from cupel.experiment import Grid
from cupel.files import read_json
from cupel.images import datasets, defences, models, stages
from cupel.rng import rng
from cupel.training.precision import settled


def named(folder: Path) -> tuple[str, str, dict[str, str]]:
    """Scale, family and cell of a victim, which its folder names."""
    _, scale, family, _, dataset, model, recipe, attack, seed = folder.parts[-9:]
    return scale, family, {"dataset": dataset, "model": model, "recipe": recipe, "attack": attack.partition("@")[0],
                           "rate": attack.partition("@")[2], "seed": seed.removeprefix("seed")}


def measure(folder: Path, asked: argparse.Namespace) -> list[dict]:
    """ACC and ASR of each defence and stream on the victim in `folder`, one row each."""
    scale, family, cell = named(folder)
    attack, seed = folder.parts[-2:]
    family, cell = Grid(["fst", "ims"], scale).families[family], {**cell, "budget": asked.budget}
    dataset, spec = cell["dataset"], family.victim(cell)
    settings, target = settled(spec["settings"], "cpu"), spec["settings"].get("target", 0)
    train, test = (datasets.load(f"data/images/{dataset}", part) for part in ("train", "test"))
    trigger = stages.make_attack(spec["attack"], read_tensors(folder / "trigger.npz"))
    before, rows = read_json(folder / "metrics.json"), []
    for name in asked.defences:
        defence = family.defence({**cell, "defence": name})
        chosen = stages.clean_budget(train, spec, defence["budget"])
        training = settings["training"]
        for stream, precision in itertools.product(range(asked.streams), asked.precisions or [training["precision"]]):
            budget = defences.Budget(np.asarray(train.images[chosen]), train.labels[chosen], len(train.classes),
                                     crop=training["crop"], flip=training.get("flip", True), precision=precision)
            begun = time.process_time()
            network, history = defences.purify(defence["function"], models.load(folder / "model.safetensors"), budget,
                                         rng(stream, "streams"), **defence["settings"])
            seconds = time.process_time() - begun
            found, _ = stages.evaluate(network, test, trigger, target, "cpu", precision=training["precision"])
            rows.append({"victim": f"{scale}: {attack}, {seed}", "victim acc": before["acc"], "victim asr": before["asr"],
                         "defence": name, "precision": precision, "stream": stream, "cpu seconds": seconds,
                         "rows of history": len(history), **{key: found[key] for key in ("acc", "asr", "ra")}})
            print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("victims", type=Path, nargs="+")
    parser.add_argument("--defences", nargs="+", default=["ft", "fst"])
    parser.add_argument("--budget", default="heldout")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), help="the recipe's, where none is named")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    rows = [row for folder in asked.victims for row in measure(folder, asked)]
    asked.out.write_text(json.dumps(rows, indent=1) + "\n")
    table = pd.DataFrame(rows).groupby(["victim", "victim acc", "victim asr", "defence", "precision"])[["acc", "asr", "ra"]]
    print((100 * table.agg(["mean", "std", "min", "max"])).round(1).to_markdown())
