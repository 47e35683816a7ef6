"""Which recipe implants a backdoor: ACC and ASR of a victim under changes of its training, on images that neither it nor the
test set has: those that its recipe holds out for defenders.

    python benchmarks/recipes.py badnets@0.01 [--scale desk] [--recipe fst] [--seed 0] [--change crop=0 epochs=12] [--threads 1]

Prints one row of JSON: the change, ACC and ASR, seconds, and after each epoch the share of poisoned images that the network
takes for the target.
"""

import argparse
import json
import time

import numpy as np
import torch
import yaml

from cupel.experiment import Grid
from cupel.files import read_json
from cupel.images import datasets, models, stages
from cupel.rng import derive, rng
from cupel.training.engine import Recipe, fit
from cupel.training.precision import settled


def measure(asked: argparse.Namespace) -> dict:
    """The row of one training."""
    attack, _, rate = asked.victim.partition("@")
    spec = Grid(["fst", "ims"], asked.scale).families["images"].victim(
        {"dataset": "cifar10", "model": "resnet18", "recipe": asked.recipe, "attack": attack, "rate": rate, "seed": asked.seed})
    settings, data = settled(spec["settings"], "cpu"), datasets.load("data/images/cifar10", "train")
    manifest = read_json("data/images/cifar10/manifest.json")
    split = stages.training_split(data, settings, asked.seed)
    victim, aside = data.take(split.train), data.take(split.held_out)
    attack, target = stages.make_attack(spec["attack"]), settings.get("target", 0)
    poisoned = attack.poison(victim, float(rate), target, rng(asked.seed, "poison", spec["attack"]["function"]))
    images, labels, groups = victim.images, victim.labels.copy(), np.zeros(len(victim), np.int64)
    images[poisoned.indices], labels[poisoned.indices], groups[poisoned.indices] = poisoned.images, poisoned.labels, 1
    model = models.build("resnet18", num_classes=10, mean=manifest["mean"], std=manifest["std"],
                         seed=derive(asked.seed, "initialisation"), **settings["model"])
    change = dict(yaml.safe_load(pair.replace("=", ": ", 1)).popitem() for pair in asked.change)
    begun = time.perf_counter()
    recipe = Recipe(**settings["training"] | change)
    history = fit(model, images, labels, recipe, seed=derive(asked.seed, "victim"), groups=groups)
    seconds = time.perf_counter() - begun
    found, _ = stages.evaluate(model, aside, attack, target, "cpu", precision=settings["training"]["precision"])
    return {"victim": asked.victim, "seed": asked.seed, "change": change, "acc": found["acc"], "asr": found["asr"],
            "seconds": round(seconds), "poisoned": [round(row["acc_poisoned"], 3) for row in history]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("victim", help="attack@rate")
    parser.add_argument("--scale", default="desk")
    parser.add_argument("--recipe", default="fst")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--change", nargs="*", default=[], help="settings of training, as crop=0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(json.dumps(measure(asked)))
