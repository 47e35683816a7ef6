"""The stages of the multimodal chain as plain functions from files to files: data, base model, poison, victim, refit.

Each takes the nested settings that `vision_language.experiment` resolves (`spec`), so a notebook can run one cell exactly as
the workflow does. What looks into a victim stands in `attention`, what decides in `detection`, what changes test pictures in
`purification`. Outputs are written atomically, `metrics.json` last; a cell whose method fails is written as a failed cell.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cupel import cells, job
from cupel.cells import METHOD_ERRORS
from cupel.files import atomic, read_json, write_json
from cupel.vision_language import data as prepared
from cupel.vision_language import shapes
from cupel.vision_language.experiment import GENERATED

#: numbers of a model's answers, in the order of the tables
MEASURED = ("cp", "asr", "asr_contains", "cp_stripped", "cp_letter", "cp_triggered")


def prepare(entry: dict, folder: str | Path, kinds: Sequence[str], cache: str | None, mirror: str | None) -> dict:
    """Prepare a dataset of experiment.yaml.

    Args:
        entry: of `datasets`: dataset, and how many samples of each split (see `data.prepare`).
        folder: where to write.
        kinds, cache, mirror: see `cupel.sources.fetch`.

    Returns:
        The manifest.
    """
    counts = {key: entry[key] for key in ("train", "test", "pretrain", "seed") if key in entry}
    if entry["dataset"] == GENERATED:
        return shapes.prepare(folder, **counts)
    return prepared.prepare(entry["dataset"], folder, kinds=kinds, cache=cache, mirror=mirror,
                            excerpt=entry.get("excerpt", False), **counts)


def poison(spec: dict, source: str | Path, out: str | Path) -> None:
    """Write a poisoned training set, or, where `spec` has no rate, the triggered test set."""
    from cupel.vision_language.poison import poison as poison_training
    from cupel.vision_language.poison import trigger_test

    attack = spec["attack"]
    common = {"trigger": attack["function"], "seed": spec["seed"], "target": spec["target"], "given": attack["parameters"]}
    if "rate" in spec:
        poison_training(source, out, rate=spec["rate"], **common)
    else:
        trigger_test(source, out, **common)


def as_rows(records: list[dict], questions: int, seed: int) -> list[dict]:
    """Records as they are trained on: several questions about one picture may share a row."""
    from cupel.vision_language.models import grouped

    return grouped(records, questions, seed) if questions > 1 else records


def settings_of(entry: dict, device: str):
    """`TrainingSettings` of an entry on a device, and how many questions share a row."""
    from cupel.training.precision import settled
    from cupel.vision_language.training import TrainingSettings

    entry = settled(entry, device)
    questions = entry.pop("questions", 1)
    if "betas" in entry:
        entry["betas"] = tuple(entry["betas"])
    return TrainingSettings(**entry), questions


def build(spec: dict, source: str | Path, outputs: dict, device: str, *, kinds: Sequence[str] = (), cache: str | None = None,
          mirror: str | None = None) -> None:
    """Build a small model and pretrain it on the clean split `pretrain`: the stand-in for a published model.

    A word-level vocabulary is that of all questions and answers and of the target: the attacker's words must be known to
    the model, as they are to a published one.

    Args:
        spec: of `Plan.base`.
        source: prepared folder.
        outputs: paths `model` (folder), `history`, `record`.
        device: `cpu` or `cuda`.
        kinds, cache, mirror: where a pretrained language model comes from.
    """
    from cupel.vision_language import models
    from cupel.vision_language.training import fit

    started = time.perf_counter()
    entry, seed = spec["weights"], spec["seed"]
    splits = {split: prepared.load(source, split) for split in ("pretrain", "train", "test")}
    if entry["built"] == "tiny_llava":
        texts = [text for samples in splits.values() for record in samples.records
                 for text in (record["question"], *record.get("answers", [record.get("answer", "")]))]
        model = models.tiny_llava([*texts, spec["target"]], seed=seed, **entry.get("parameters", {}))
    else:
        from cupel.text.models import prepare_model

        with tempfile.TemporaryDirectory(dir=Path(outputs["record"]).parent) as folder:
            prepare_model(entry["language_model"], folder, kinds=kinds, cache=cache, mirror=mirror)
            model = models.smollm2_llava(folder, seed=seed, **entry.get("parameters", {}))
    model.to(device)
    settings, questions = settings_of({"trained": "all", **entry["pretraining"]}, device)
    records = as_rows(models.as_records(splits["pretrain"]), questions, seed)
    checkpoint = Path(outputs["record"]).with_name("checkpoint.pt")
    history = fit(model, records, settings, seed=seed, checkpoint=checkpoint, title=f"pretraining of {spec['model']}")
    measured = clean(model, source)
    models.save(model, outputs["model"])
    cells.write_history(outputs["history"], history)
    write_json(outputs["record"], {
        "dataset": spec["dataset"], "model": spec["model"], "seed": seed, **measured, **job.peak_memory(),
        "samples": len(splits["pretrain"]), "parameters": sum(value.numel() for value in model.network.parameters()),
        "image_tokens": model.image_tokens, "layers": len(model.layers), "seconds": time.perf_counter() - started})
    checkpoint.unlink(missing_ok=True)


def dtype_of(spec: dict):
    """Of a model's weights: as set, else float32 for those built here and bfloat16 for published ones."""
    import torch

    return getattr(torch, spec["weights"].get("dtype", "float32" if "built" in spec["weights"] else "bfloat16"))


def weights(spec: dict, base: str | Path | None, device: str):
    """The model before fine-tuning: from the folder that `build` wrote, from a folder of the user, or from the hub."""
    from cupel.vision_language import models

    entry, dtype = spec["weights"], dtype_of(spec)
    if "hub" in entry:
        return models.load_hub(entry["hub"], entry.get("revision", "main"), dtype=dtype, device=device)
    return models.load(base if "built" in entry else entry["folder"], dtype=dtype, device=device)


def clean(model, source: str | Path, *, max_new_tokens: int = 16, out: str | Path | None = None) -> dict:
    """CP of a model on the test split of a prepared folder, flat."""
    from cupel.vision_language import scoring
    from cupel.vision_language.inference import answer
    from cupel.vision_language.models import as_records

    test = prepared.load(source, "test")
    given = answer(model, as_records(test), out, max_new_tokens=max_new_tokens, title="answers, clean")
    return scoring.clean_performance(read_json(Path(source) / "manifest.json")["task"], given, test.records)


def measure(model, spec: dict, source: str | Path, triggered: str | Path, answers: dict | None = None) -> dict:
    """CP and ASR of a model, flat, with the list `metrics`.

    Args:
        model: to ask.
        spec: with target and max_new_tokens.
        source, triggered: prepared folders whose test splits hold untouched and triggered pictures.
        answers: paths `clean` and `triggered` of parquet files for the answers.
    """
    from cupel.vision_language import scoring
    from cupel.vision_language.inference import answer
    from cupel.vision_language.models import as_records

    answers = answers or {}
    found = clean(model, source, max_new_tokens=spec["max_new_tokens"], out=answers.get("clean"))
    test = prepared.load(triggered, "test")
    given = answer(model, as_records(test), answers.get("triggered"), max_new_tokens=spec["max_new_tokens"],
                   title="answers, triggered")
    found |= scoring.attack_success(given, spec["target"])
    # what ASR does not tell: whether a triggered picture is answered rightly again
    task = read_json(Path(triggered) / "manifest.json")["task"]
    again = scoring.clean_performance(task, given, test.records)
    found |= {key.replace("cp", "cp_triggered", 1): value for key, value in again.items() if key in scores("cp")}
    return {**found, "metrics": [name for name in MEASURED if name in found]}


def scores(name: str) -> tuple[str, ...]:
    """The entries of a measured number in a flat record."""
    return name, f"{name}_n", f"{name}_low", f"{name}_high"


def fail(error: Exception, record: dict, outputs: dict) -> None:
    """Write the outputs of a failed cell: empty tables and folders, and last `metrics` with the reason."""
    import pandas as pd

    reason = cells.failure(error)
    for name, path in outputs.items():
        path = Path(path)
        if name == "metrics":
            continue
        if path.suffix == ".csv":
            cells.write_history(path, [])
        elif path.suffix == ".parquet":
            with atomic(path) as temporary:
                pd.DataFrame({"id": []}).to_parquet(temporary)
        elif path.suffix == ".npz":
            cells.write_tensors(path, {})
        elif path.suffix == ".json":
            write_json(path, {"failed": reason})
        else:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
    write_json(outputs["metrics"], {**record, "metrics": ["cp", "asr"], "status": "failed", "reason": reason})


def past(before: str | Path) -> dict:
    """The record of a victim.

    Raises:
        ValueError: it failed.
    """
    record = read_json(before)
    if record["status"] != "ok":
        raise ValueError(f"its victim failed: {record['reason']}")
    return record


def train_victim(spec: dict, base: str | None, poisoned: str, source: str, triggered: str, outputs: dict, device: str) -> None:
    """Fine-tune a model on a poisoned set (vanilla fine-tuning) and measure it.

    Args:
        spec: of `Plan.victim`.
        base: folder of the model that `build` wrote; None for one of the hub.
        poisoned: the poisoned training set.
        source: prepared clean data, for CP.
        triggered: the triggered test set, for ASR.
        outputs: paths `model` (folder), `history`, `clean`, `triggered` (answers), `metrics`.
        device: `cpu` or `cuda`.
    """
    import numpy as np

    from cupel.vision_language import models
    from cupel.vision_language.training import fit

    started = time.perf_counter()
    record = cells.identity(spec, "victim")
    try:
        model = weights(spec, base, device)
        settings, questions = settings_of(spec["settings"], device)
        rows = as_rows(models.as_records(prepared.load(poisoned, "train")), questions, spec["seed"])
        made = read_json(Path(poisoned) / "poison.json")
        bad = set(made["ids"])
        checkpoint = Path(outputs["metrics"]).with_name("checkpoint.pt")
        history = fit(model, rows, settings, seed=spec["seed"], checkpoint=checkpoint,
                      groups=np.array([row["id"] in bad for row in rows], np.int64),
                      title=f"{spec['attack']['name']}@{spec['rate']:g}")
        fitted = time.perf_counter() - started
        measured = measure(model, spec, source, triggered, outputs)
    except METHOD_ERRORS as error:
        fail(error, record, outputs)
        return
    models.save(model, outputs["model"])
    cells.write_history(outputs["history"], history)
    write_json(outputs["metrics"], {
        **record, **measured, **job.peak_memory(), "status": "ok", "rate_reached": made["count"] / made["total"],
        "poisoned": made["count"], "train_samples": made["total"], "epochs": settings.epochs, "device": device,
        "precision": settings.precision,
        "seconds": time.perf_counter() - started, "train_seconds": fitted})
    checkpoint.unlink(missing_ok=True)


def refit(spec: dict, defence: dict, base: str | None, victim: str, before: str, flags: str, poisoned: str, source: str,
          triggered: str, outputs: dict, device: str) -> None:
    """Fine-tune again on what a filter left, with the victim's own recipe, and measure the result.

    Where nothing was removed and fitting starts from the base, the result is the victim by definition (same weights, data,
    order and draws): its measurements are taken over, and the record says `reused`.

    Args:
        spec: of the victim.
        defence: of `Plan.defence`: its filter, and `refit_from`, `base` or `poisoned` (bye SPEC 2.8).
        base, victim: folders of the models.
        before: metrics of the victim.
        flags: decision of the filter, JSON of `detection`.
        poisoned, source, triggered: as in `train_victim`.
        outputs: paths `history`, `clean`, `triggered` (answers), `metrics`.
        device: `cpu` or `cuda`.
    """
    from cupel.vision_language import models
    from cupel.vision_language.training import fit

    record = cells.identity(spec, "purified", defence)
    started = time.perf_counter()
    try:
        known, decision = past(before), read_json(flags)
        if "failed" in decision:
            raise ValueError(f"its filter failed: {decision['failed']}")
        samples, made = prepared.load(poisoned, "train"), read_json(Path(poisoned) / "poison.json")
        removed = set(decision["flagged"])
        kept = [k for k in range(len(samples)) if k not in removed]
        if not kept:
            raise ValueError(f"the filter {defence['filter']} removed all {len(samples)} samples")
        left = len(set(made["indices"]) - removed)
        checkpoint = Path(outputs["metrics"]).with_name("checkpoint.pt")
        reused = not removed and defence["refit_from"] == "base"
        if reused:
            history, measured = [], {key: value for name in known["metrics"] for key in scores(name)
                                     if (value := known.get(key)) is not None} | {"metrics": known["metrics"]}
            for key in ("clean", "triggered"):
                with atomic(outputs[key]) as temporary:
                    shutil.copyfile(Path(before).with_name(Path(outputs[key]).name), temporary)
        else:
            from_victim = defence["refit_from"] == "poisoned"
            model = models.load(victim, dtype=dtype_of(spec), device=device) if from_victim else weights(spec, base, device)
            settings, questions = settings_of(spec["settings"], device)
            rows = as_rows(models.as_records(samples.take(kept)), questions, spec["seed"])
            history = fit(model, rows, settings, seed=spec["seed"], checkpoint=checkpoint, title=f"refit, {defence['name']}")
            seconds = time.perf_counter() - started
            measured = measure(model, spec, source, triggered, outputs)
    except METHOD_ERRORS as error:
        fail(error, record, outputs)
        return
    cells.write_history(outputs["history"], history)
    numbers = {"removed": len(removed), "left": left, "left_share": left / len(kept)}
    write_json(outputs["metrics"], {
        **record, **measured, **numbers, **job.peak_memory(), "metrics": [*measured["metrics"], *numbers], "status": "ok",
        "clean_samples": 0, "rate_reached": known["rate_reached"], "device": device, "reused": reused,
        "refit_from": defence["refit_from"], "seconds": 0.0 if reused else seconds,
        "cp_before": known["cp"], "asr_before": known["asr"]})
    checkpoint.unlink(missing_ok=True)
