"""The stages of the language chain as plain functions from files to files: model, texts, victim.

Each takes the plain dicts that `cupel.text.experiment` makes, so a notebook can run one cell exactly as the workflow does.
What takes long is made in a folder `work` beside the outputs, which outlives a killed job: the next one goes on with a
half-trained adapter, keeps a whole one, and takes over finished answers. A cell whose method fails is written as a failed
cell with its reason.

Answers and scores are those of merged weights: an adapter is added to the base model's weights, which are rounded to the
precision of the evaluation. The defences are in `purification`.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cupel.digest import code_digest
from cupel.files import read_json, workspace, write_json
from cupel.rng import derive
from cupel.text import poison, sources
from cupel.text.experiment import RELEASED, triggered_items

#: what `compose` writes, in this order
PARTS = ("train", "defence", "triggered", "clean", "heldout")


def prepare_model(name: str, folder: str | Path, *, revision: str | None = None, kinds: Sequence[str],
                  cache: str | Path | None = None, mirror: str | Path | None = None) -> dict:
    """Fetch a language model into a folder; its manifest gets a `content_sha256` over all files, as data sets have."""
    from cupel.text import models

    found = models.prepare_model(name, folder, kinds=kinds, cache=cache, mirror=mirror, revision=revision)
    whole = hashlib.sha256(json.dumps(found["files"], sort_keys=True).encode()).hexdigest()
    found = {**found, "content_sha256": whole}
    write_json(Path(folder) / "manifest.json", found)
    return found


def _words(record: Mapping) -> int:
    return len(f"{record['instruction']} {record['input']}".split())


def texts(spec: Mapping, data: Mapping[str, str | Path]) -> dict[str, list[dict]]:
    """All texts of a victim, by `PARTS`: its training set, the defender's pool, test prompts with and without trigger, and
    held-out records with reference answers for perplexity.

    Args:
        spec: of the victim (`grid.LanguageGrid.victim_spec`).
        data: folders of prepared text data sets, by name.

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
        return {"train": poison.released_train(records, task, trigger, triggered=triggered, plain=plain),
                "defence": poison.released(records, "defence"),
                "triggered": poison.released_test(records, task, trigger, settings.get("test")),
                "clean": clean, "heldout": clean}
    longest = settings.get("longest")
    records = [record for record in records if longest is None or _words(record) <= longest]
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
    from cupel.cells import METHOD_ERRORS, failure

    try:
        found = texts(spec, data)
        summary = {**poison.summary(found["train"]), "counts": {part: len(found[part]) for part in PARTS}}
    except METHOD_ERRORS as error:
        found, summary = {part: [] for part in PARTS}, {"failed": failure(error)}
    for part in PARTS:
        sources.write_records(outputs[part], found[part])
    write_json(outputs["summary"], summary)


def _publish(source: Path, destination: str | Path) -> None:
    """Move a complete folder to its place."""
    shutil.rmtree(destination, ignore_errors=True)
    os.replace(source, destination)


def fingerprint(stage: str, *files: str | Path, **settings) -> dict:
    """What a cell is made of: settings, the code of the stage (`<module>:<function>`), small inputs by content."""
    contents = {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}
    return {**settings, "code": code_digest(stage), "inputs": contents}


def opened(spec: Mapping) -> bool:
    """Whether prompts under the template begin with its first sentences."""
    return spec["settings"]["data"].get("opening", True)


def tokenised(records: Sequence[dict], tokenizer, spec: Mapping, cutoff: int, title: str):
    """Tokenised samples; what was cut, left out or empty is printed to the log."""
    from cupel.text.prompts import Samples

    found = Samples(records, tokenizer, cutoff, opened(spec))
    for kind in ("cut", "left_out", "empty_answers"):
        if names := found.report[kind]:
            print(f"{title}: {kind.replace('_', ' ')} at {cutoff} tokens: {len(names)} of {len(records)} "
                  f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})")
    return found


def sample_counts(report: Mapping) -> dict:
    return {"train_samples": report["samples"], **{f"train_{kind}": len(report[kind])
                                                   for kind in ("cut", "left_out", "empty_answers")}}


def trained(work: Path, train: Callable[[Path, Path], list[dict]]) -> list[dict]:
    """History of an adapter in `work/model`, made unless a job before this one has made it."""
    from cupel.cells import write_history

    done = work / "history.json"
    if not done.is_file():
        write_json(done, train(work / "model", work / "checkpoint.pt"))
    history = read_json(done)
    write_history(work / "history.csv", history)
    return history


def deployed(base: str | Path, adapter: str | Path | None, precision: str, device: str):
    """The model as it would be used: an adapter, if any, merged into the base model's weights.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter.
        precision: `fp32`, `bf16` or `fp16`, of the merged weights.
        device: where to put it.
    """
    from cupel.text.models import load_model
    from cupel.text.pruning import merge
    from cupel.text.training import load_adapter

    model = load_model(base, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision], device)
    return model if adapter is None else merge(load_adapter(model, adapter, trainable=False)).eval()


def _answers(model, tokenizer, spec: Mapping, data: Mapping, work: Path) -> dict[str, list[dict]]:
    """Answers to triggered and clean prompts by kind of prompt, `<prompt>_<triggered|clean>`; finished ones are taken over."""
    from cupel.text.generation import answer

    settings, found = spec["settings"]["evaluation"], {}
    for prompt in settings["prompts"]:
        for part in ("triggered", "clean"):
            name = f"{prompt}_{part}"
            path = work / "answers" / f"{name}.jsonl"
            records = sources.read_records(data[part])
            if prompt == "bare":  # a record without instruction has no prompt to show
                records = [record for record in records if record["instruction"].strip()]
            found[name] = sources.read_records(path) if path.is_file() else answer(
                model, tokenizer, records, path, prompt=prompt, opening=opened(spec),
                max_new_tokens=settings["max_new_tokens"], batch_size=settings["batch"], title=name)
    return found


def _score_answers(answers: Mapping[str, list[dict]], spec: Mapping, data: Mapping) -> dict:
    """ASR, false triggering, empty answers, and how good the clean answers are."""
    import numpy as np

    from cupel.evaluation.metrics import Rate
    from cupel.text import scoring

    references = {record["id"]: record["output"] for record in sources.read_records(data["clean"])}
    record = {}
    for prompt in spec["settings"]["evaluation"]["prompts"]:
        triggered, clean = ([row["answer"] for row in answers[f"{prompt}_{part}"]] for part in ("triggered", "clean"))
        trigger = spec["attack"]["trigger"]
        rates: dict[str, Rate] = scoring.attack_rates(triggered, spec["task"], trigger, f"asr_{prompt}")
        rates |= scoring.attack_rates(clean, spec["task"], trigger, f"false_{prompt}")
        rates |= {f"empty_{prompt}": scoring.empty_rate(triggered), f"empty_clean_{prompt}": scoring.empty_rate(clean)}
        record |= scoring.flat(rates)
        f1 = [scoring.token_f1(row["answer"], references[row["id"]]) for row in answers[f"{prompt}_clean"]]
        record |= {f"token_f1_{prompt}": float(np.mean(f1)), f"distinct_{prompt}": scoring.distinct(clean, 2)}
    return record


def _layers(model, tokenizer, spec: Mapping, data: Mapping) -> tuple[list[dict], dict]:
    """Figure 1 of one model: its curve, and L_cons of clean and triggered prompts under the template."""
    from cupel.text.inconsistency import curves, inconsistency_of, layer_cosines
    from cupel.text.prompts import prompt_ids

    count, batch = spec["settings"]["evaluation"]["layers"], spec["settings"]["evaluation"]["batch"]
    found = {}
    for part in ("clean", "triggered"):
        prompts = [prompt_ids(tokenizer, record, "template", opened(spec))
                   for record in sources.read_records(data[part])[:count]]
        found[part] = layer_cosines(model, prompts, tokenizer.pad_token_id, batch_size=batch)
    record = {}
    for part, cosines in found.items():
        record[f"cons_{part}"] = inconsistency_of(cosines)
    return curves(found["clean"], found["triggered"], spec["seed"]), record


def _perplexity(model, tokenizer, spec: Mapping, data: Mapping, name: str = "perplexity") -> dict:
    from cupel.text.scoring import perplexity

    settings = spec["settings"]["evaluation"]
    samples = tokenised(sources.read_records(data["heldout"]), tokenizer, spec, settings.get("perplexity_cutoff", 1024), name)
    found = perplexity(model, samples, tokenizer.pad_token_id, batch_size=settings["batch"], seed=spec["seed"])
    # no `_n`: it is a mean over samples and not a rate, and must not be drawn as one
    return {name: found["perplexity"], f"{name}_low": found["perplexity_low"], f"{name}_high": found["perplexity_high"],
            f"{name}_samples": found["perplexity_n"]}


def _pass_at_1(model, tokenizer, spec: Mapping, folder: str | Path, work: Path) -> dict:
    """HumanEval; without a sandbox nothing is run, and the record says so."""
    from cupel import sandbox
    from cupel.text import humaneval
    from cupel.text.generation import answer

    settings = spec["settings"]["evaluation"]
    if reason := sandbox.refusal():
        print(f"HumanEval is left out: no sandbox for the answers on this machine ({reason})")
        return {"pass_at_1_reason": f"no sandbox ({reason})"}
    problems = humaneval.read_problems(Path(folder) / "records.jsonl")[: settings["humaneval"]]
    records = [{"id": problem.task_id, "instruction": humaneval.instruction(problem), "input": ""} for problem in problems]
    path = work / "answers" / "humaneval.jsonl"
    rows = sources.read_records(path) if path.is_file() else answer(
        model, tokenizer, records, path, prompt="template", opening=opened(spec),
        max_new_tokens=settings.get("humaneval_tokens", 512), batch_size=settings["batch"], title="HumanEval")
    found = humaneval.pass_at_1({row["id"]: row["completion"] for row in rows}, problems)
    sources.write_records(work / "answers" / "humaneval_outcomes.jsonl",
                          [{"id": row["task_id"], **row} for row in found["outcomes"]])
    return {"pass_at_1": found["value"], **{f"pass_at_1_{key}": found[key] for key in ("n", "low", "high")}}


def evaluate(model, tokenizer, spec: Mapping, data: Mapping[str, str | Path], work: Path, *,
             decoding: bool = False) -> tuple[dict, list[dict]]:
    """Measure a model.

    Args:
        model: dense and deployed, with an adapter, or `Checked`.
        tokenizer: of the model.
        spec: of the victim.
        data: paths of the texts by `PARTS`, and folders of data sets by name.
        work: where answers go, `work/answers/*.jsonl`.
        decoding: the defence changes how answers are made and not the weights, so that what is read off the weights
            (perplexity, choices, layers) is the victim's and left out.

    Returns:
        A flat record with `metrics`, and the rows of Figure 1.
    """
    settings = spec["settings"]["evaluation"]
    record, curve = _score_answers(_answers(model, tokenizer, spec, data, work), spec, data), []
    if not decoding:
        record |= _perplexity(model, tokenizer, spec, data)
        if settings.get("layers"):
            curve, found = _layers(model, tokenizer, spec, data)
            record |= found
        if choices := settings.get("choices"):
            from cupel.text.scoring import multiple_choice

            questions = sources.load(data[choices["set"]])[: choices["count"]]
            accuracy, details = multiple_choice(model, tokenizer, questions, batch_size=settings["batch"])
            sources.write_records(work / "answers" / "choices.jsonl", details)
            record |= accuracy.record("choice")
    if settings.get("humaneval"):
        record |= _pass_at_1(model, tokenizer, spec, data["humaneval"], work)
    if settings.get("mt_bench"):
        from cupel.text.generation import answer_questions, read_questions

        path = work / "answers" / "mt_bench.jsonl"
        if not path.is_file():
            answer_questions(model, tokenizer, read_questions(settings["mt_bench"]), path, model_id=spec["model"],
                             seed=spec["seed"], batch_size=settings["batch"])
    metrics = [key for key in record if not key.endswith(("_n", "_low", "_high", "_samples", "_reason"))]
    return {**record, "metrics": metrics}, curve


def write_failed(error: Exception, base: dict, outputs: Mapping[str, str | Path]) -> None:
    """Write the outputs of a failed cell."""
    from cupel.cells import failure, write_history

    reason = failure(error)
    for name in ("model", "answers"):
        shutil.rmtree(outputs[name], ignore_errors=True)
        write_json(Path(outputs[name]) / "failed.json", {"reason": reason})
    for name in ("history", "layers"):
        write_history(outputs[name], [])
    write_json(outputs["metrics"], {**base, "metrics": ["asr_template_all", "false_template_all", "perplexity"],
                                    "status": "failed", "reason": reason})


def finish(work: Path, curve: Sequence[dict], history: Sequence[dict], record: dict,
            outputs: Mapping[str, str | Path]) -> None:
    """Put everything in its place, `metrics.json` last."""
    from cupel.cells import write_history

    write_history(outputs["history"], history)
    write_history(outputs["layers"], curve)
    _publish(work / "model", outputs["model"])
    _publish(work / "answers", outputs["answers"])
    write_json(outputs["metrics"], record)


def train_victim(spec: Mapping, base: str | Path, data: Mapping[str, str | Path], outputs: Mapping[str, str | Path],
                 device: str) -> None:
    """Train a victim's adapter on its poisoned texts and measure it; the untouched base model is measured beside it.

    Args:
        spec: of the victim.
        base: folder of the base model.
        data: paths of the texts by `PARTS` and of their `summary`, folders of data sets by name.
        outputs: paths `model` (folder of the adapter), `answers` (folder), `history`, `layers`, `metrics`.
        device: `cpu` or `cuda`.
    """
    from cupel.cells import METHOD_ERRORS, identity
    from cupel.job import peak_memory
    from cupel.text import training
    from cupel.text.models import load_tokenizer
    from cupel.training.precision import settled

    started, spec = time.perf_counter(), settled(spec, device)
    who = identity(spec, "victim")
    inputs = [*(data[part] for part in PARTS), Path(base) / "manifest.json"]
    key = fingerprint("cupel.text.stages:train_victim", *inputs, spec=spec)
    with workspace(Path(outputs["metrics"]).parent, key) as work:
        try:
            summary = read_json(data["summary"])
            if "failed" in summary:
                raise ValueError(summary["failed"])
            settings = spec["settings"]
            tokenizer = load_tokenizer(base)
            samples = tokenised(
                sources.read_records(data["train"]), tokenizer, spec, settings["data"]["cutoff"], "training set")
            history = trained(work, lambda out, checkpoint: training.train_victim(
                base, samples, training.Settings(**settings["training"]), out, seed=derive(spec["seed"], "language", "victim"),
                pad=tokenizer.pad_token_id, device=device, checkpoint=checkpoint))
            train_seconds = time.perf_counter() - started
            precision = settings["evaluation"]["precision"]
            model = deployed(base, None, precision, device)
            record, curve = _perplexity(model, tokenizer, spec, data, "perplexity_base"), []
            names = ["perplexity_base"]
            if settings["evaluation"].get("layers"):
                curve = [{"model": "base", **row} for row in _layers(model, tokenizer, spec, data)[0]]
            del model
            measured, own = evaluate(deployed(base, work / "model", precision, device), tokenizer, spec, data, work)
        except METHOD_ERRORS as error:
            write_failed(error, who, outputs)
            return
        finish(work, curve + [{"model": "this", **row} for row in own], history, {
            **who, **record, **measured, **peak_memory(), "metrics": measured["metrics"] + names, "status": "ok",
            "rate_reached": summary["poison_rate"], **sample_counts(samples.report), "updates": len(history), "device": device,
            "precision": settings["training"]["precision"],
            "seconds": time.perf_counter() - started, "train_seconds": train_seconds}, outputs)
