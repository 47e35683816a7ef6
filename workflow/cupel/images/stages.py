"""The stages of the image chain as plain functions from files to files: trigger, poison, victim, purify.

Each takes the nested settings that the grid resolves (`spec`), so a notebook can run one cell exactly as the workflow
does. Outputs are written atomically; a cell whose method fails (diverges, asks for the impossible) is written as a
failed cell with its reason, and the report shows it.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cupel.cells import fail, failure, identity, past, read_tensors, write_history, write_tensors
from cupel.evaluation.metrics import confusion, destroyed, effects, rates
from cupel.files import digest, kept, noted, publish, read_json, write_json
from cupel.images import datasets, defences, models
from cupel.images.attacks import Attack, ImpossibleRate, PoisonRecord, build
from cupel.images.datasets import Dataset, splits
from cupel.images.defences.masks import write
from cupel.job import costs, separately
from cupel.prepared import content
from cupel.rng import derive, rng
from cupel.training.engine import Recipe, fit, predict
from cupel.training.precision import settled


@dataclass(frozen=True)
class Inputs:
    """Where the inputs of a stage lie.

    Attributes:
        data: folder of prepared data sets.
        record: poison record of the victim.
        trigger: tensors of the trigger: prepared, where the attack has one to prepare; for a defence those of the victim,
            for evaluation only.
        victim: its checkpoint.
        before: its metrics.
    """

    data: str
    record: str | Path | None = None
    trigger: str | Path | None = None
    victim: str | Path | None = None
    before: str | Path | None = None


@dataclass(frozen=True)
class Job:
    """A defence to run: what it is, the digest of the code that makes the cell, and the paths of its outputs."""

    defence: dict
    code: str
    outputs: dict


def training_split(train: Dataset, settings: dict, seed: int) -> splits.Split:
    """Victim's training set and held-out set of a recipe."""
    return splits.split(train.labels, held_out=settings.get("held_out", 0.0), train_size=settings.get("train_size"),
                        seed=seed, order=settings.get("hold_out_order", "first"),
                        remove=settings.get("remove_held_out", True))


def training_set(spec: dict, data: str) -> Dataset:
    """What a victim is trained on, before poisoning."""
    train = datasets.load(f"{data}/{spec['dataset']}", "train")
    return train.take(training_split(train, spec["settings"], spec["seed"]).train)


def make_attack(spec: dict, tensors: dict[str, np.ndarray] | None = None) -> Attack | None:
    """The attack of a cell, None for clean training. `smaller` is a setting of the preparation, not of the attack."""
    if spec["function"] == "none":
        return None
    if tensors and "failed" in tensors:
        raise ValueError(str(tensors["failed"]))
    parameters = {k: v for k, v in spec["settings"].items() if k != "smaller"}
    return build(spec["function"], tensors=tensors or {}, **parameters)


def prepare_trigger(spec: dict, data: str, model: str | None, out: str, device: str) -> None:
    """Compute what a trigger is made of, from the victim's training set before poisoning.

    Where the method fails, the file says so, and every victim that needs the trigger becomes a failed cell.
    """
    clean = training_set(spec, data)
    try:
        attack = make_attack(spec["attack"])
        network = models.load(model).to(device).eval() if model else None
        tensors = attack.prepare(clean, network, spec["settings"].get("target", 0),
                                 derive(spec["seed"], "trigger", spec["attack"]["name"]), device=device,
                                 smaller=spec["attack"]["settings"].get("smaller", 1.0))
    except Exception as error:
        tensors = {"failed": failure(error)}
    write_tensors(out, tensors)


def poison(spec: dict, data: str, trigger: str | None, out: str) -> None:
    """Write the poison record of a victim. An impossible request is written in its place, and the victim reports it."""
    clean = training_set(spec, data)
    target = spec["settings"].get("target", 0)
    stream = rng(spec["seed"], "poison", spec["attack"]["function"])
    try:
        attack = make_attack(spec["attack"], read_tensors(trigger))
        record = attack.poison(clean, spec["poison_rate"], target, stream) if attack else PoisonRecord.empty(clean, 0.0, target)
    except Exception as error:
        write_tensors(out, {"failed": failure(error)})
    else:
        record.save(out)


def stored(model, path: str | Path, images: np.ndarray, device: str):
    """Save a network, and give it as its file gives it again: that is what is measured, and what others will load.

    Args:
        images: uint8 [N, H, W, C], on which both must answer alike.

    Raises:
        ValueError: they do not, because the network does something that no file holds, such as a forward hook; or it is not
            the network that its `spec` builds (classes, layers, types).
        Diverged: weights or answers are not finite.
    """
    given = predict(model, images, device=device)
    models.save(model, path)
    again = models.load(path)
    found = predict(again, images, device=device)
    if found.shape != given.shape or np.abs(found - given).max() > 0.01 * np.abs(given).max():
        raise ValueError("the network answers otherwise once it is saved and loaded: a hook, or code outside its weights, is "
                         "in no file; change weights, or use cupel.images.models.attachments")
    return again


def answers(model, images: np.ndarray, classes: int, device: str, precision: str) -> np.ndarray:
    """Predicted classes int64 [N] of uint8 images [N, H, W, C].

    Raises:
        ValueError: the network does not have one output for each class.
        Diverged: an output is not finite.
    """
    logits = predict(model, images, device=device, precision=precision)
    if logits.shape != (len(images), classes):
        raise ValueError(f"the network gives outputs of shape {logits.shape} for {len(images)} images of {classes} classes")
    return logits.argmax(1)


def evaluate(model, test: Dataset, attack: Attack | None, target: int, device: str, *, precision: str) -> tuple[dict, dict]:
    """ACC, ASR and RA, in the precision that the network was trained in; ACC alone where there is no attack.

    Returns:
        The flat record of rates with counts and 95 % intervals; and true and predicted classes, int64 [N] each, of the `clean`
        images, and of the `triggered` ones where there is an attack.
    """
    classes = len(test.classes)
    taken = {"clean": (test.labels, answers(model, test.images, classes, device, precision))}
    triggered = wanted = true = np.zeros(0, np.int64)
    if attack is not None:
        stamped, wanted, true = attack.test_set(test, target)
        triggered = answers(model, stamped, classes, device, precision)
        taken["triggered"] = true, triggered
    found = rates(taken["clean"][1], test.labels, triggered, wanted, true)
    return {key: value for name, rate in found.items() if rate.n for key, value in rate.record(name).items()}, taken


def confusions(taken: dict, classes: int) -> dict[str, list]:
    """What a record keeps of the answers of `evaluate`: how many images of each true class (rows) were taken for which class
    (columns); nothing where there are more than 50 classes."""
    return {name: confusion(*pair, classes).tolist() for name, pair in taken.items()} if classes <= 50 else {}


def train_victim(spec: dict, inputs: Inputs, outputs: dict, device: str) -> None:
    """Train a victim on a poisoned training set and measure it.

    Args:
        spec: dataset, model, recipe, attack, poison_rate, seed, settings.
        inputs: `data`, `record`, and `trigger` where the attack has one prepared.
        outputs: paths `model`, `trigger`, `history`, `metrics`.
    """
    started = time.perf_counter()
    base = identity(spec, "victim")
    try:
        manifest = read_json(f"{inputs.data}/{spec['dataset']}/manifest.json")
        settings, seed = settled(spec["settings"], device), spec["seed"]
        target = settings.get("target", 0)
        clean = training_set(spec, inputs.data)
        if (refused := read_tensors(inputs.record).get("failed")) is not None:
            raise ValueError(str(refused))
        poisoned = PoisonRecord.load(inputs.record)
        images, labels, groups = clean.images, clean.labels.copy(), np.zeros(len(clean), np.int64)
        images[poisoned.indices], labels[poisoned.indices] = poisoned.images, poisoned.labels
        groups[poisoned.indices[~poisoned.cover]] = 1
        attack = make_attack(spec["attack"], read_tensors(inputs.trigger))
        hook = attack.hook(spec["poison_rate"], target, len(clean.classes), derive(seed, "hook")) if attack else None
        training = {"flip": manifest["flip"], **settings["training"]}
        training["milestones"] = tuple(training.get("milestones", ()))
        recipe = Recipe(**training)
        model = models.build(spec["model"], num_classes=len(clean.classes), image_size=clean.image_size,
                             mean=manifest["mean"], std=manifest["std"], in_channels=clean.images.shape[-1],
                             seed=derive(seed, "initialisation"), **settings.get("model", {}))
        checkpoint = Path(outputs["model"]).with_name("checkpoint.pt")
        history = fit(model, images, labels, recipe, seed=derive(seed, "victim"), device=device, hook=hook,
                      groups=groups, checkpoint=checkpoint, title=f"{spec['attack']['name']}@{spec['poison_rate']:g}")
        if hook is not None:
            attack = make_attack(spec["attack"], hook.tensors() or read_tensors(inputs.trigger))
        reached = (hook if hook is not None and attack.batchwise else poisoned).rate_reached
        if attack and not reached:
            raise ImpossibleRate(f"at rate {spec['poison_rate']:g} no sample of {len(clean)} was poisoned")
        test = splits.test_subset(datasets.load(f"{inputs.data}/{spec['dataset']}", "test"), settings.get("test_size"))
        measured, taken = evaluate(stored(model, outputs["model"], test.images[:64], device), test, attack, target, device,
                                   precision=recipe.precision)
    except Exception as error:
        fail(error, base, outputs)
        return
    write_tensors(outputs["trigger"], attack.tensors if attack else {})
    write_history(outputs["history"], history)
    write_json(outputs["metrics"], {
        **base, **measured, **costs(), "status": "ok", "confusion": confusions(taken, len(test.classes)),
        "rate_reached": reached, "target": target,
        "model_sha256": digest(outputs["model"]), "train_samples": len(clean), "epochs": recipe.epochs,
        "device": device, "precision": recipe.precision,
        "seconds": time.perf_counter() - started, "train_seconds": sum(row["seconds"] for row in history)})
    checkpoint.unlink(missing_ok=True)


def clean_budget(train: Dataset, spec: dict, budget: dict) -> np.ndarray:
    """Indices of the defender's clean images, into the original training set.

    `held_out`: the images held out before victim training. `spc`: samples per class out of the clean version of the
    victim's training set (IMS), or out of the held-out images (`pool: held_out`), which the victim has never seen.
    """
    parts = training_split(train, spec["settings"], spec["seed"])
    if budget["kind"] == "held_out":
        if not len(parts.held_out):
            raise ValueError(f"budget {budget['name']} uses held-out images, but recipe {spec['recipe']} holds out none "
                             "(experiment.yaml, recipes: held_out)")
        return parts.held_out
    pool = parts.held_out if budget.get("pool") == "held_out" else parts.train
    return splits.per_class(train.labels, pool, budget["spc"], spec["seed"])


def _leaks(defence: dict, victim: dict) -> dict:
    """Settings of a defence; `victim:acc` becomes what was measured on the TEST set, where released code does so."""
    return {key: victim[value.removeprefix("victim:")] if isinstance(value, str) and value.startswith("victim:") else value
            for key, value in defence["settings"].items()}


def purify(spec: dict, defence: dict, inputs: Inputs, outputs: dict, device: str) -> None:
    """Run a defence on a victim and measure the result, and what came between where the defence leaves it (`Budget.snapshot`).

    The record says `unchanged` where the result is the victim to the bit, and `destroyed` as `metrics.destroyed` does.

    Args:
        defence: name, function, hyperparameters, budget.
        inputs: `data`, `victim`, `trigger`, `before`.
        outputs: paths `model`, `history`, `metrics`, and `details`: arrays that the defence keeps, if it keeps any.
    """
    base = identity(spec, "purified", defence)
    try:
        victim = past(inputs.before, inputs.victim)
        manifest = read_json(f"{inputs.data}/{spec['dataset']}/manifest.json")
        train = datasets.load(f"{inputs.data}/{spec['dataset']}", "train")
        settings = settled(spec["settings"], device)
        target = settings.get("target", 0)
        chosen = clean_budget(train, spec, defence["budget"])
        training = settings["training"]
        budget = defences.Budget(
            np.asarray(train.images[chosen]), train.labels[chosen], len(train.classes),
            crop=training.get("crop", 4), flip=training.get("flip", manifest["flip"]), device=device,
            precision=training.get("precision", "fp32"),
            checkpoint=str(Path(outputs["model"]).with_name("checkpoint.pt")))
        network = models.load(inputs.victim).to(device).eval()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        stream = rng(spec["seed"], "defence", defence["function"], defence["budget"]["name"])
        model, history = defences.purify(defence["function"], network, budget, stream, **_leaks(defence, victim))
        seconds = time.perf_counter() - started
        attack = make_attack(spec["attack"], read_tensors(inputs.trigger))
        test = splits.test_subset(datasets.load(f"{inputs.data}/{spec['dataset']}", "test"), settings.get("test_size"))
        model = stored(model, outputs["model"], test.images[:64], device)
        measured, taken = evaluate(model, test, attack, target, device, precision=budget.precision)
        stages = {}
        for name, tensors in budget.snapshots.items():
            between = copy.deepcopy(model)
            write(between, tensors)
            for key, value in evaluate(between, test, attack, target, device, precision=budget.precision)[0].items():
                metric, *end = key.split("_")
                stages["_".join([metric, name, *end])] = value
        write_history(outputs["history"], history)
        if budget.details:
            write_tensors(outputs["details"], budget.details)
        write_json(outputs["metrics"], {
            **base, **measured, **costs(), "status": "ok", "confusion": confusions(taken, len(test.classes)),
            "clean_samples": len(chosen), "device": device, "precision": budget.precision, "seconds": seconds,
            "rate_reached": victim["rate_reached"], "unchanged": digest(outputs["model"]) == victim["model_sha256"],
            "destroyed": destroyed(victim, measured),
            **{f"{name}_before": victim[name] for name in ("acc", "asr", "ra") if name in victim}, **stages,
            **effects(victim, measured, rng(spec["seed"], "intervals"))})
    except Exception as error:
        fail(error, base, {name: path for name, path in outputs.items() if name != "details"})
        return
    Path(budget.checkpoint).unlink(missing_ok=True)


def purify_block(spec: dict, jobs: Sequence[Job], inputs: Inputs, device: str) -> None:
    """Run many defences on one victim, as `purify` does, each in a process of its own.

    Snakemake deletes the outputs of a job before it runs it again. So cells are made in folders `work` beside their outputs
    and are linked to their names when all are there. The next job takes over those that are finished and whole, each by itself,
    if settings, code and inputs are the same: after a kill, after a defence was added, or where one cell was removed.

    Raises:
        Exception: the first of the machine's errors, once all other defences are done; a child has printed its traceback.
    """
    read = [*map(digest, (inputs.victim, inputs.trigger, inputs.before)), content(f"{inputs.data}/{spec['dataset']}")]
    made, errors = [], []
    for job in jobs:
        key = {"spec": spec, "defence": job.defence, "code": job.code, "inputs": read, "device": device}
        work = kept(Path(job.outputs["metrics"]).parent, key)
        files, seal = {name: work / Path(path).name for name, path in job.outputs.items()}, work / "made.json"
        if noted(seal) != {name: digest(file) for name, file in files.items() if file.is_file()}:
            try:
                separately(purify, spec, job.defence, inputs, files, device)
                write_json(seal, {name: digest(file) for name, file in files.items() if file.is_file()})
            except Exception as error:
                errors.append(error)
        made.append(files)
    if errors:
        raise errors[0]
    for files, job in zip(made, jobs, strict=True):
        for name, path in job.outputs.items():
            if files[name].is_file():
                publish(files[name], Path(path))
            else:  # what this defence does not keep, an earlier one of the same name may have kept
                Path(path).unlink(missing_ok=True)
