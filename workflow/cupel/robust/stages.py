"""Training of a robust network as a plain function from files to files.

Measuring it is another module, `measure`, so that a change in an evaluation trains nothing again.
"""

import time
from pathlib import Path

import numpy as np
import torch

from cupel import cells, checkpoint
from cupel.evaluation.intervals import wilson
from cupel.files import digest, write_json
from cupel.images import datasets
from cupel.images.datasets import splits
from cupel.job import costs
from cupel.rng import derive, rng
from cupel.robust.experiment import fraction
from cupel.robust.models import build, load
from cupel.robust.objectives import Objective, Ramp
from cupel.training.engine import Recipe, fit, predict
from cupel.training.precision import settled


def identity(spec: dict, stage: str) -> dict:
    """What names a cell, flat. The method stands in the column `defence`; no image is poisoned."""
    return cells.identity({**spec, "attack": {"name": ""}, "poison_rate": 0.0}, stage,
                          {"name": spec["method"], "budget": {"name": ""}, "settings": spec["parameters"]})


def training_set(train: datasets.Dataset, settings: dict, seed: int) -> datasets.Dataset:
    """What is trained on: without the first `validation` images (proper_interpretability SPEC 4), and of the rest
    `train_size`, if given, with every class represented by its share."""
    pool = np.arange(settings.get("validation", 0), len(train))
    size = settings.get("train_size")
    if size is not None and size < len(pool):
        pool = splits.stratified(train.labels, pool, size, rng(seed, "subset"))
    return train.take(pool)


def make_recipe(training: dict, steps_per_epoch: int) -> Recipe:
    """The engine's recipe: Adam, no augmentation, no weight decay, no partial batches (proper_interpretability SPEC 2.6, 6).

    `lr_steps` are steps; the engine's rate changes between epochs, so they become the nearest ones.
    """
    training = dict(training)
    drops = tuple(round(step / steps_per_epoch) for step in training.pop("lr_steps", []))
    schedule = {"schedule": "multistep", "milestones": drops} if drops else {}
    return Recipe(**{"optimizer": "adam", "weight_decay": 0.0, "crop": 0, "flip": False, "drop_last": True,
                     "schedule": "constant", **training, **schedule})


def make_objective(spec: dict, steps_per_epoch: int) -> Objective:
    """The objective of a cell."""
    inner = spec["settings"]["inner"]
    ramp = Ramp(fraction(inner["eps"]), *inner["ramp"])
    return Objective(spec["function"], ramp=ramp, inner_steps=inner["steps"], step_size=fraction(inner["step_size"]),
                     steps_per_epoch=steps_per_epoch, seed=derive(spec["seed"], "objective"), **spec["parameters"])


def train_network(spec: dict, data: str, outputs: dict, device: str) -> None:
    """Train a network with an objective, by `Experiments.training`, and measure its clean accuracy on the whole test set.

    `data` is the folder of prepared data sets; outputs: paths `model`, `history`, `metrics`.
    """
    started, base = time.perf_counter(), identity(spec, "trained")
    settings, seed = settled(spec["settings"], device), spec["seed"]
    begun = Path(outputs["model"]).with_name("checkpoint.pt")
    try:
        train = training_set(datasets.load(f"{data}/{spec['dataset']}", "train"), settings, seed)
        steps = max(len(train) // settings["training"]["batch_size"], 1)
        recipe, objective = make_recipe(settings["training"], steps), make_objective(spec, steps)
        model = build(spec["model"], num_classes=len(train.classes), in_channels=train.images.shape[-1],
                      seed=settings.get("initial_seed", 99) + seed)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        history = fit(model, train.images, train.labels, recipe, seed=derive(seed, "training"), device=device,
                      objective=objective, hook=objective, checkpoint=begun, title=spec["method"])
        test = splits.test_subset(datasets.load(f"{data}/{spec['dataset']}", "test"), settings.get("test_size"))
        checkpoint.save(model, outputs["model"])  # what is measured is what lies there
        right = predict(load(outputs["model"]), test.images, device=device).argmax(1) == test.labels
    except Exception as error:
        cells.fail(error, {**base, "metrics": ["acc"]}, outputs)
        return
    low, high = wilson(int(right.sum()), len(right))
    seconds = [row["seconds"] for row in history]
    rows = [{"metric": "acc", "value": float(right.mean()), "n": len(right), "low": low, "high": high},
            {"metric": "seconds_per_epoch", "value": float(np.median(seconds))}]
    cells.write_history(outputs["history"], history)
    write_json(outputs["metrics"], {
        **base, **costs(), "status": "ok", "rows": rows, "train_eps": objective.ramp.eps, "epochs": recipe.epochs,
        "steps": recipe.epochs * steps, "train_samples": len(train), "model_sha256": digest(outputs["model"]), "device": device,
        "precision": recipe.precision, "train_seconds": sum(seconds),
        "seconds": time.perf_counter() - started})
    begun.unlink(missing_ok=True)
