"""The stages of the vision-language chain as plain functions from files to files: data, base model, poison, victim, refit.

Each takes the nested settings that the plan resolves (`spec`), so a notebook can run one cell exactly as the workflow does.
What looks into a victim stands in `attention`, what decides in `detection`, what changes test pictures in `purification`.
Outputs are written atomically, `metrics.json` last; a cell whose method fails is written as a failed cell.
"""

import importlib
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from cupel import cells, job
from cupel.evaluation.metrics import destroyed
from cupel.files import atomic, digest, read_json, write_json
from cupel.vision_language import datasets, prepared
from cupel.vision_language.inputs import Inputs

#: numbers of a model's answers, in the order of the tables
MEASURED = ("cp", "asr", "asr_contains", "cp_stripped", "cp_letter", "cp_triggered")


def prepare(entry: dict, folder: str | Path, **sources) -> dict:
    """Prepare a dataset of experiment.yaml (an entry of `datasets`) in a folder; gives the manifest.

    `sources` are kinds, cache and mirror: see `cupel.sources.fetch`.
    """
    asked = {key: entry[key] for key in ("train", "test", "pretrain", "seed") if key in entry}
    if entry["dataset"] in datasets.GENERATED:
        return importlib.import_module(f"{datasets.__name__}.{entry['dataset']}").prepare(folder, **asked)
    asked |= {key: entry[key] for key in ("excerpt", "asks", "without", "pretrain_asks") if key in entry}
    return datasets.prepare(datasets.describe(entry["dataset"]), folder, **sources, **asked)


def poison(spec: dict, source: str | Path, out: str | Path) -> None:
    """Write a poisoned training set, or, where `spec` has no poison rate, the triggered test set.

    Where the trigger fails, `manifest.json` and `poison.json` say so, and every victim that needs the folder is a failed cell.
    """
    from cupel.vision_language.poison import poison as poison_training
    from cupel.vision_language.poison import trigger_test

    function, parameters = spec["attack"]["function"], spec["attack"]["settings"]
    common = {"function": function, "parameters": parameters, "seed": spec["seed"], "target": spec["target"]}
    try:
        if "poison_rate" in spec:
            poison_training(source, out, poison_rate=spec["poison_rate"], **common)
        else:
            trigger_test(source, out, **common)
    except Exception as error:
        failed = {"failed": cells.failure(error)}
        for name in ("poison.json", "manifest.json"):
            write_json(Path(out) / name, failed)


def settings_of(entry: dict, device: str):
    """`TrainingSettings` of an entry on a device, and how many questions share a row."""
    from cupel.training.precision import settled
    from cupel.vision_language.training import TrainingSettings

    entry = settled(entry, device)
    questions = entry.pop("questions", 1)
    return TrainingSettings(**entry), questions


def build(spec: dict, source: str | Path, outputs: dict, device: str, **sources) -> None:
    """Build a small model and pretrain it on the clean split `pretrain`: the stand-in for a published model.

    A word-level vocabulary is that of all questions and answers and of the target: the attacker's words must be known to
    the model, as they are to a published one.

    Outputs are paths `model` (folder), `history` and `record`; `sources` are kinds, cache and mirror of a pretrained
    language model. Where building fails the record says so, and every victim of the model is a failed cell.
    """
    from cupel.vision_language import models
    from cupel.vision_language.training import fit

    started = time.perf_counter()
    entry, seed, record = spec["weights"], spec["seed"], {key: spec[key] for key in ("dataset", "model", "seed")}
    checkpoint = Path(outputs["record"]).with_name("checkpoint.pt")
    try:
        splits = {split: prepared.load(source, split) for split in ("pretrain", "train", "test")}
        if entry["built"] == "tiny_llava":
            texts = [text for samples in splits.values() for sample in samples.records
                     for text in (sample["question"], *sample.get("answers", [sample.get("answer", "")]))]
            model = models.tiny_llava([*texts, spec["target"]], seed=seed, **entry.get("settings", {}))
        else:
            from cupel.text.models import prepare_model

            with tempfile.TemporaryDirectory(dir=Path(outputs["record"]).parent) as folder:
                prepare_model(entry["language_model"], folder, **sources)
                model = models.smollm2_llava(folder, seed=seed, **entry.get("settings", {}))
        model.network.to(device)
        settings, questions = settings_of({"trained": "all", **entry["pretraining"]}, device)
        records = models.grouped(models.as_records(splits["pretrain"]), questions, seed)
        history = fit(model, records, settings, seed=seed, checkpoint=checkpoint, title=f"pretraining of {spec['model']}")
        _, measured = answered(model, source)
        models.save(model, outputs["model"])
    except Exception as error:
        cells.fail(error, record, {"model": outputs["model"], "history": outputs["history"], "metrics": outputs["record"]})
        return
    cells.write_history(outputs["history"], history)
    write_json(outputs["record"], {
        **record, **measured, **job.costs(), "status": "ok", "model_sha256": digest(outputs["model"]),
        "samples": len(splits["pretrain"]), "parameters": sum(value.numel() for value in model.network.parameters()),
        "image_tokens": model.image_tokens, "layers": len(model.layers), "seconds": time.perf_counter() - started})
    checkpoint.unlink(missing_ok=True)


def dtype_of(spec: dict):
    """Of a model's weights: as set, else float32 for those built here and bfloat16 for published ones."""
    import torch

    return getattr(torch, spec["weights"].get("dtype", "float32" if "built" in spec["weights"] else "bfloat16"))


def weights(spec: dict, base: str | Path | None, device: str):
    """The model before fine-tuning: from the folder that `build` wrote, from a folder of the user, or from the hub.

    Raises:
        ValueError: `build` failed.
        ChangedVictim: what it built was changed.
    """
    from cupel.vision_language import models

    if "built" in spec["weights"]:
        made = read_json(Path(base).with_name("base.json"))
        if made.get("status", "ok") != "ok":
            raise ValueError(f"the model that it starts from failed: {made['reason']}")
        if digest(base) != made["model_sha256"]:
            raise cells.ChangedVictim(f"{base} is not the model that base.json beside it tells of: remove both and run the "
                                      "same command again")

    entry, dtype = spec["weights"], dtype_of(spec)
    if "hub" in entry:
        return models.load_hub(entry["hub"], entry.get("revision", "main"), dtype=dtype, device=device)
    return models.load(base if "built" in entry else entry["folder"], dtype=dtype, device=device)


def answered(model, source: str | Path, *, max_new_tokens: int = 16, out: str | Path | None = None,
             title: str = "answers, clean") -> tuple[list[str], dict]:
    """A model's answers on the test split of a prepared folder, and their CP, flat."""
    from cupel.vision_language import scoring
    from cupel.vision_language.inference import answer
    from cupel.vision_language.models import as_records

    test = prepared.load(source, "test")
    given = answer(model, as_records(test), out, max_new_tokens=max_new_tokens, title=title)
    return given, scoring.clean_performance(read_json(Path(source) / "manifest.json")["task"], given, test.records)


def measure(model, spec: dict, inputs: Inputs, answers: dict) -> dict:
    """CP and ASR of a model, flat, with the list `metrics`.

    Inputs are `data` and `triggered`; `answers` are paths `clean` and `triggered` of parquet files.
    """
    from cupel.vision_language import scoring

    _, found = answered(model, inputs.data, max_new_tokens=spec["max_new_tokens"], out=answers["clean"])
    given, again = answered(model, inputs.triggered, max_new_tokens=spec["max_new_tokens"], out=answers["triggered"],
                            title="answers, triggered")
    found |= scoring.attack_success(given, spec["target"])
    # what ASR does not tell: whether a triggered picture is answered rightly again
    found |= {key.replace("cp", "cp_triggered", 1): value for key, value in again.items() if key in scores("cp")}
    return {**found, "metrics": [name for name in MEASURED if name in found]}


def scores(name: str) -> tuple[str, ...]:
    """The entries of a measured number in a flat record."""
    return name, f"{name}_n", f"{name}_low", f"{name}_high"


def fine_tune(model, spec: dict, samples: prepared.Samples, device: str, *, checkpoint: Path, title: str,
              bad: Collection[str] = ()):
    """Fit a model by the victim's recipe, in place; ids in `bad` have an accuracy of their own in the history.

    Returns:
        The history and the `TrainingSettings`.
    """
    import numpy as np

    from cupel.vision_language import models
    from cupel.vision_language.training import fit

    settings, questions = settings_of(spec["settings"], device)
    rows = models.grouped(models.as_records(samples), questions, spec["seed"])
    groups = np.array([row["id"] in bad for row in rows], np.int64)
    return fit(model, rows, settings, seed=spec["seed"], checkpoint=checkpoint, groups=groups, title=title), settings


def train_victim(spec: dict, inputs: Inputs, outputs: dict, device: str) -> None:
    """Fine-tune a model on a poisoned set (vanilla fine-tuning) and measure it.

    Inputs are `data`, `poisoned`, `triggered`, and `base` for a model that `build` wrote; outputs are paths `model` (folder),
    `history`, `clean`, `triggered` (answers), `metrics`.
    """
    from cupel.vision_language import models

    started = time.perf_counter()
    record = cells.identity(spec, "victim")
    checkpoint = Path(outputs["metrics"]).with_name("checkpoint.pt")
    try:
        prepared.load(inputs.triggered, "test")  # it is wanted only after hours of training
        samples = prepared.load(inputs.poisoned, "train")
        made = read_json(Path(inputs.poisoned) / "poison.json")
        model = weights(spec, inputs.base, device)
        history, settings = fine_tune(model, spec, samples, device, checkpoint=checkpoint,
                                      title=f"{spec['attack']['name']}@{spec['poison_rate']:g}", bad=set(made["ids"]))
        fitted = time.perf_counter() - started
        models.save(model, outputs["model"])
        model = None  # two of them need not fit on a device
        model = models.load(outputs["model"], dtype=dtype_of(spec), device=device)
        measured = measure(model, spec, inputs, outputs)
        cells.write_history(outputs["history"], history)
        write_json(outputs["metrics"], {
            **record, **measured, **job.costs(), "status": "ok", "model_sha256": digest(outputs["model"]),
            "rate_reached": made["count"] / made["total"], "poisoned": made["count"],
            "train_samples": made["total"], "epochs": settings.epochs, "device": device,
            "precision": settings.precision, "seconds": time.perf_counter() - started, "train_seconds": fitted})
    except Exception as error:
        cells.fail(error, {**record, "metrics": ["cp", "asr"]}, outputs)
        return
    checkpoint.unlink(missing_ok=True)


def refit(spec: dict, defence: dict, inputs: Inputs, outputs: dict, device: str) -> None:
    """Fine-tune again on what a filter left, with the victim's own recipe, and measure the result.

    Where nothing was removed and fitting starts from the base, the result is the victim by definition (same weights, data,
    order and draws): its measurements are taken over, and the record says `reused`
    and `unchanged`.

    The defence says its filter, and `refit_from`, `base` or `poisoned` (bye SPEC 2.8). Inputs are those of `train_victim`,
    `victim`, `before`, and `flags`, the decision of the filter; outputs `history`, `clean`, `triggered`, `metrics`.
    """
    from cupel.vision_language import models

    record = cells.identity(spec, "purified", defence)
    started, seconds = time.perf_counter(), 0.0
    checkpoint = Path(outputs["metrics"]).with_name("checkpoint.pt")
    try:
        known, decision = cells.past(inputs.before, inputs.victim), read_json(inputs.flags)
        if "failed" in decision:
            raise ValueError(f"its filter failed: {decision['failed']}")
        samples, made = prepared.load(inputs.poisoned, "train"), read_json(Path(inputs.poisoned) / "poison.json")
        removed = set(decision["flagged"])
        kept = [k for k in range(len(samples)) if k not in removed]
        if not kept:
            raise ValueError(f"the filter {defence['filter']} removed all {len(samples)} samples")
        from_base = defence["refit_from"] == "base"
        reused = from_base and not removed
        if reused:
            history, measured = [], {"metrics": known["metrics"]} | {
                key: known[key] for name in known["metrics"] for key in scores(name) if known.get(key) is not None}
            for key in ("clean", "triggered"):
                with atomic(outputs[key]) as temporary:
                    shutil.copyfile(Path(inputs.before).with_name(Path(outputs[key]).name), temporary)
        else:
            model = (weights(spec, inputs.base, device) if from_base
                     else models.load(inputs.victim, dtype=dtype_of(spec), device=device))
            history, _ = fine_tune(model, spec, samples.take(kept), device, checkpoint=checkpoint,
                                   title=f"refit, {defence['name']}")
            seconds = time.perf_counter() - started
            measured = measure(model, spec, inputs, outputs)
        cells.write_history(outputs["history"], history)
        left = len(set(made["indices"]) - removed)
        numbers = {"removed": len(removed), "left": left, "left_share": left / len(kept)}
        write_json(outputs["metrics"], {
            **record, **measured, **numbers, **job.costs(), "metrics": [*measured["metrics"], *numbers], "status": "ok",
            "clean_samples": 0, "rate_reached": known["rate_reached"], "device": device, "reused": reused, "unchanged": reused,
            "destroyed": destroyed(known, measured), "refit_from": defence["refit_from"], "seconds": seconds,
            "cp_before": known["cp"], "asr_before": known["asr"]})
    except Exception as error:
        cells.fail(error, {**record, "metrics": ["cp", "asr"]}, outputs)
        return
    checkpoint.unlink(missing_ok=True)
