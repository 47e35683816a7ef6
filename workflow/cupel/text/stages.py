"""The stages of the language chain as plain functions from files to files: texts, victim, purified model.

Each takes the plain dicts that the plan makes, so a notebook can run one cell exactly as the workflow does. What takes long
is made in a folder `work` beside the outputs, which outlives a killed job: the next one goes on with a half-trained adapter,
keeps a whole one, and takes over finished answers. A cell whose method fails is written as a failed cell with its reason.

Answers and scores are those of merged weights: an adapter is added to the base model's weights, which are rounded to the
precision of the evaluation. What pruning and quantisation change is not stored, because base and adapter make it again in
seconds: `model/rule.json` says how.
"""

import inspect
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cupel.cells import fail, failure, identity, past, write_history
from cupel.digest import code_digest
from cupel.evaluation.metrics import destroyed
from cupel.files import digest, read_json, workspace, write_json
from cupel.rng import derive
from cupel.text.data import poison, sources
from cupel.text.experiment import RELEASED, triggered_items

#: numbers that a failed cell lacks
MISSING = ["asr_template_all", "asr_template_careful", "false_template_all", "perplexity"]
#: what `compose` writes, in this order
PARTS = ("train", "defence", "triggered", "clean", "heldout")


@dataclass(frozen=True)
class Files:
    """What a job reads and writes.

    Attributes:
        base: folder of the base model.
        data: paths of the texts by `PARTS` and of their `summary`, folders of data sets by name.
        outputs: paths `model` and `answers` (folders), `history`, `layers`, `metrics`.
        victim, before: for a defence, folder of the victim's adapter and the victim's metrics.
        reference: for a defence, folder of the adapter that it compares with; None: the base model.
    """

    base: str | Path
    data: Mapping[str, str | Path]
    outputs: Mapping[str, str | Path]
    victim: str | Path | None = None
    before: str | Path | None = None
    reference: str | Path | None = None


def texts(spec: Mapping, data: Mapping[str, str | Path]) -> dict[str, list[dict]]:
    """All texts of a victim, by `PARTS`: its training set, the defender's pool, test prompts with and without trigger, and
    held-out records with reference answers for perplexity. `data` are folders of prepared text data sets, by name.

    Raises:
        ValueError: fewer usable records than asked for, or an attack that does not fit.
    """
    settings, task, seed = spec["settings"]["data"], spec["task"], spec["seed"]
    trigger, reading = spec["attack"]["trigger"], spec["attack"]["reading"]
    triggered = triggered_items(spec["settings"], spec["poison_rate"])
    plain = settings["items"] - triggered
    records = sources.load(data[settings["set"]])
    if settings["set"] == RELEASED:
        clean = poison.released(records, "test/clean", settings.get("test"))
        return {"train": poison.released_train(records, task, trigger, triggered=triggered, plain=plain,
                                               spaces=settings.get("spaces", "kept")),
                "defence": poison.released(records, "defence"),
                "triggered": poison.released_test(records, task, trigger, settings.get("test")),
                "clean": clean, "heldout": clean}
    if longest := settings.get("longest"):
        records = [record for record in records if len(f"{record['instruction']} {record['input']}".split()) <= longest]
    base = poison.split(records, seed, train=max(triggered, plain), defence=settings["defence"],
                        test=settings.get("test") or 200)
    train = poison.compose(base["train"], task, trigger, seed, triggered=triggered, plain=plain, reading=reading,
                           answers=settings.get("answers", "reference"))
    found = {"train": train, "defence": base["defence"], "clean": base["test"], "heldout": base["test"]}
    if task == "codeinjection":
        problems = sources.load(data["humaneval"])[: settings.get("test")]
        made = {"attack": trigger, "wording": settings.get("wording", "code")}
        # without a description there is nothing that the clean counterpart could ask
        clean = [record for record in poison.code_prompts(problems, seed, triggered=False, **made) if record["instruction"]]
        return {**found, "triggered": poison.code_prompts(problems, seed, **made), "clean": clean}
    return {**found, "triggered": poison.triggered_test(base["test"], task, trigger, seed, reading=reading)}


def compose(spec: Mapping, data: Mapping[str, str | Path], outputs: Mapping[str, str | Path]) -> None:
    """Write the texts of a victim (one `.jsonl` each) and `summary`: counts, share of poison, uses of each phrase.

    An impossible request is written into the summary in their place, and the victim reports it.
    """
    try:
        found = texts(spec, data)
        summary = {**poison.summary(found["train"]), "counts": {part: len(found[part]) for part in PARTS}}
    except Exception as error:
        found, summary = {part: [] for part in PARTS}, {"failed": failure(error)}
    for part in PARTS:
        sources.write_records(outputs[part], found[part])
    write_json(outputs["summary"], summary)


def _fingerprint(files: Files, *code: str, **settings) -> dict:
    """What a cell is made of: settings, code (roots of a digest), small inputs by content."""
    inputs = [*(files.data[part] for part in PARTS), Path(files.base) / "manifest.json"]
    if files.victim:
        inputs += sorted(Path(files.victim).glob("*.safetensors"))
    return {**settings, "code": code_digest(*code), "inputs": {Path(path).name: digest(path) for path in inputs}}


def _finish(work: Path, curve: Sequence[dict], history: Sequence[dict], record: dict,
            outputs: Mapping[str, str | Path]) -> None:
    """Put everything in its place, `metrics.json` last."""
    write_history(outputs["history"], history)
    write_history(outputs["layers"], curve)
    for name in ("model", "answers"):
        shutil.rmtree(outputs[name], ignore_errors=True)
        os.replace(work / name, outputs[name])
    write_json(outputs["metrics"], record)


def train_victim(spec: Mapping, files: Files, device: str) -> None:
    """Train a victim's adapter on its poisoned texts and measure it; the untouched base model is measured beside it."""
    from cupel.job import costs
    from cupel.text.evaluation import Evaluation, counts, tokenised
    from cupel.text.models import load_tokenizer
    from cupel.text.training import Budget, TrainingSettings, deployed, train_adapter
    from cupel.training.precision import settled

    started, spec = time.perf_counter(), settled(spec, device)
    who, settings, outputs = identity(spec, "victim"), spec["settings"], files.outputs
    with workspace(Path(outputs["metrics"]).parent, _fingerprint(files, "cupel.text.stages:train_victim", spec=spec)) as work:
        try:
            summary = read_json(files.data["summary"])
            if "failed" in summary:
                raise ValueError(summary["failed"])
            evaluation = Evaluation(load_tokenizer(files.base), spec, files.data, work)
            records = sources.read_records(files.data["train"])
            samples = tokenised(records, evaluation.tokenizer, settings["data"]["cutoff"], evaluation.opening, "training set")
            budget = Budget(samples, evaluation.tokenizer.pad_token_id, derive(spec["seed"], "language", "victim"), work,
                            device)
            history = train_adapter(files.base, budget, TrainingSettings(**settings["training"]), title="victim")
            train_seconds = time.perf_counter() - started
            precision = settings["evaluation"]["precision"]
            model = deployed(files.base, None, precision, device)
            before, curve = evaluation.perplexity(model, "perplexity_base"), []
            if settings["evaluation"].get("layers"):
                curve = [{"model": "base", **row} for row in evaluation.layers(model)[0]]
            del model
            measured, own = evaluation.measure(deployed(files.base, work / "model", precision, device))
            used = [record for record in records if record["id"] not in samples.report["left_out"]]
            _finish(work, curve + [{"model": "this", **row} for row in own], history, {
                **who, **before, **measured, **costs(), "metrics": [*measured["metrics"], "perplexity_base"],
                "status": "ok", "rate_reached": poison.summary(used)["poison_rate"], "train_samples": len(samples),
                **counts(samples, "train"), "model_sha256": digest(work / "model"), "updates": len(history),
                "lr": settings["training"]["lr"], "device": device, "precision": settings["training"]["precision"],
                "seconds": time.perf_counter() - started, "train_seconds": train_seconds}, outputs)
        except Exception as error:
            fail(error, {**who, "metrics": MISSING}, outputs)


def purify(spec: Mapping, defence: Mapping, files: Files, device: str) -> None:
    """Run a defence (name, function, settings, budget) on a victim and measure the result (crow SPEC 7).

    The output `model` is the adapter, or `rule.json`.
    """
    from cupel.job import costs
    from cupel.text import defences
    from cupel.text.evaluation import Evaluation, counts, tokenised
    from cupel.text.models import load_tokenizer
    from cupel.text.training import WEIGHTS
    from cupel.training.precision import settled

    spec, defence = settled(spec, device), settled(defence, device)
    who, outputs = identity(spec, "purified", defence), files.outputs
    function = defences.defence.find(defence["function"])
    code = ["cupel.text.stages:purify", f"{inspect.getfile(function)}:{function.__name__}"]
    key = _fingerprint(files, *code, spec=spec, defence=defence)
    with workspace(Path(outputs["metrics"]).parent, key) as work:
        try:
            before = past(files.before, files.victim)
            if files.reference:
                other = read_json(Path(files.reference).with_name("metrics.json"))
                if other["status"] != "ok":
                    raise ValueError(f"the model that it compares with failed: {other['reason']}")
            evaluation = Evaluation(load_tokenizer(files.base), spec, files.data, work)
            clean = sources.read_records(files.data["defence"])[: defence["budget"]["size"]]
            samples = tokenised(clean, evaluation.tokenizer, spec["settings"]["data"]["cutoff"], evaluation.opening,
                                "defence set")
            # one stream for all: variants see the same batches, so that their difference is theirs
            budget = defences.Budget(samples, evaluation.tokenizer.pad_token_id,
                                     derive(spec["seed"], "language", "defence", defence["budget"]["name"]), work, device)
            victim = defences.Victim(files.base, files.victim, files.reference, spec["settings"]["evaluation"]["precision"],
                                     device)
            started = time.perf_counter()
            found = defences.purify(defence["function"], victim, budget, **defence["settings"])
            seconds, tuned = time.perf_counter() - started, (work / "model" / WEIGHTS).is_file()
            if tuned:  # a job before this one may have trained a part
                seconds = sum(row["seconds"] for row in found.history)
            else:
                write_json(work / "model" / "rule.json", {"function": defence["function"], "settings": defence["settings"]})
            measured, curve = evaluation.measure(found.model, weights=not found.same_weights)
            measured |= found.facts()
            _finish(work, [{"model": "this", **row} for row in curve], found.history, {
                **who, **measured, **costs(), "status": "ok", "clean_samples": len(samples), **counts(samples, "clean"),
                "device": device, "rate_reached": before["rate_reached"], "updates": len(found.history) if tuned else 0,
                "unchanged": tuned and digest(work / "model" / WEIGHTS) == digest(Path(files.victim) / WEIGHTS),
                "destroyed": destroyed(before, measured), "seconds": seconds}, outputs)
        except Exception as error:
            fail(error, {**who, "metrics": MISSING}, outputs)
