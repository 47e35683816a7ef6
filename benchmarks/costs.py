"""What an image classifier costs, against images, width, samples of each class and cells: seconds of CPU and peak memory.

    python benchmarks/costs.py [--out benchmarks/costs]

Each point is a process of its own with one thread, on noise: what is measured depends on shapes alone. A training is an epoch
in the precision of this machine; a defence runs as published, but for IMS, of which ten rounds run. Planning is a dry run of
all papers. Writes `<out>.json` and a picture, `<out>.svg`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DEFENCES = ("fst", "ft_long", "nad", "clp", "bnp", "ims")
#: by axis: values, and what is made at each: kind, images, width, samples of each class, defence
AXES = {
    "images": [("victim", count, 16, 0, "") for count in (1000, 2000, 4000, 8000)],
    "channels": [("victim", 1000, width, 0, "") for width in (8, 16, 32, 64)],
    "samples of each class": [("defence", 0, 16, spc, name) for name in DEFENCES for spc in (2, 10, 100)],
    "cells planned": [("plan", 0, 0, 0, scale) for scale in ("demo", "desk", "bench", "paper")],
}


def work(kind: str, images: int, width: int, spc: int, name: str) -> int:
    """Do what is measured, in this process; how many cells it had, where these are counted."""
    if kind == "plan":
        from cupel.experiment import Grid

        papers = ["fst", "ims", "bye", "crow", "proper_interpretability"]
        command = ["snakemake", "-n", "-q", "all", "--nolock", "--cores", "2", "--config", f"scale={name}",
                   f"papers=[{','.join(papers)}]"]
        found = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True)
        if found.returncode:
            sys.exit(found.stderr)
        return len(Grid(papers, name).cells())
    import numpy as np
    import torch

    from cupel.experiment import Grid
    from cupel.images import defences, models
    from cupel.rng import rng
    from cupel.training.engine import Recipe, fit
    from cupel.training.precision import settled

    torch.set_num_threads(1)
    family, stream = Grid(["fst", "ims"], "desk").families["images"], rng(0, "costs")
    cell = {"dataset": "cifar10", "model": "resnet18", "recipe": "fst", "attack": "badnets", "rate": "0.1", "seed": 0,
            "budget": "spc2", "defence": name}
    training = settled(family.victim(cell)["settings"], "cpu")["training"]
    network, count = models.build("resnet18", num_classes=10, width=width, seed=0), images or 10 * spc
    pixels, labels = stream.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 10
    if kind == "victim":
        fit(network, pixels, labels, Recipe(**training | {"epochs": 1}), seed=0)
        return 0
    budget = defences.Budget(pixels, labels, 10, crop=training["crop"], flip=True, precision=training["precision"])
    defence = family.defence(cell)
    few = {"rounds_initial": 5, "rounds_minimise": 5} if name == "ims" else {}
    defences.purify(defence["function"], network, budget, stream, **defence["settings"] | few)
    return 0


def measured(point: tuple) -> dict:
    """`work` in a process of its own: CPU seconds, and the peak memory of the largest process, MB."""
    begun = time.perf_counter()
    made = subprocess.run([sys.executable, __file__, "--one", json.dumps(point)], capture_output=True, text=True, check=True)
    kind, images, width, spc, name = point
    row = {"kind": kind, "images": images, "channels": width, "samples of each class": spc, "name": name,
           **json.loads(made.stdout.splitlines()[-1]), "wall": round(time.perf_counter() - begun, 1)}
    print(row, file=sys.stderr)
    return row


def draw(rows: dict[str, list[dict]], file: Path) -> None:
    """A column per axis: seconds above, memory below."""
    from cupel.reporting.figures import panels, save

    figure, axes = panels(2 * len(rows), len(rows), 3.0, 2.6)
    for column, (axis, found) in enumerate(rows.items()):
        for name in dict.fromkeys(row["name"] if row["kind"] == "defence" else row["kind"] for row in found):
            part = [row for row in found if name in (row["name"], row["kind"])]
            for place, metric in ((0, "seconds"), (1, "memory_mb")):
                axes[place, column].plot([row[axis] for row in part], [row[metric] for row in part], "o-", ms=4, label=name)
        values = sorted({row[axis] for row in found})
        values = [value for value, last in zip(values, [0, *values], strict=False) if value >= 2 * last]
        for place in (0, 1):
            axes[place, column].set_xscale("log")
            axes[place, column].set_xticks(values, [f"{value:,}" for value in values], fontsize=7)
            axes[place, column].minorticks_off()
        axes[0, column].set(yscale="log", ylim=(1, 300))
        axes[0, column].yaxis.set_major_formatter("{x:g}")
        axes[1, column].set(xlabel=axis, ylim=(0, None))
        axes[0, column].legend(fontsize=7, ncols=2)
    axes[0, 0].set_ylabel("CPU seconds")
    axes[1, 0].set_ylabel("peak memory, MB")
    save(figure, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        begun, counted = time.process_time(), work(*json.loads(asked.one))
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        seconds = time.process_time() - begun + used[1].ru_utime + used[1].ru_stime
        print(json.dumps({"seconds": round(seconds, 2), "memory_mb": round(max(use.ru_maxrss for use in used) / 1024),
                          "cells planned": counted}))
    else:
        rows = {axis: [measured(point) for point in points] for axis, points in AXES.items()}
        asked.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        draw(rows, asked.out.with_suffix(".svg"))
