"""A language model of the user: clean tuning and CROW as adapters, and answers to probe prompts before and after.

Nothing is scored: what an answer should be, the user knows.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from cupel.cells import failure, write_history
from cupel.files import digest, workspace, write_text
from cupel.hub import snapshot
from cupel.locks import alone
from cupel.own import device_of
from cupel.prepared import read_records
from cupel.registry import one_of
from cupel.rng import derive

USUAL = ("finetune", "crow")
#: hyperparameters of a defence where they are not those of `TrainingSettings` (crow SPEC 7)
OTHERS = {"crow": {"lr": 1e-3}}


def records(path: str | Path, needed: Sequence[str] = ("instruction", "output")) -> list[dict]:
    """Items of a file of JSON lines, each with `instruction`, perhaps `input`, and `output`; or prompts, one a line of text.

    Raises:
        ValueError: there are none, or one lacks a part.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix in (".jsonl", ".json"):
        items = read_records(path)
    else:
        items = [{"instruction": line.strip()} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not items:
        raise ValueError(f"{path} is empty")
    for number, item in enumerate(items, 1):
        if not all(isinstance(item.get(key), str) for key in needed):
            raise ValueError(f"{path}, item {number}: needed are {' and '.join(needed)}, as text")
    return [{"id": str(number), "input": "", **item} for number, item in enumerate(items, 1)]


def sections(defence: str, given: Mapping, precision: str) -> dict[str, dict]:
    """Hyperparameters of a defence by the section that they belong to.

    Raises:
        ValueError: one that it does not have, or a value that is none for it.
    """
    from cupel.text.consistency import Consistency
    from cupel.text.defences import check
    from cupel.text.training import TrainingSettings

    kinds = {"training": TrainingSettings} | ({"consistency": Consistency} if defence == "crow" else {})
    known = {field.name: section for section, kind in kinds.items() for field in fields(kind)}
    found = {"training": {"precision": precision, **OTHERS.get(defence, {})}}
    for key, value in given.items():
        one_of(f"parameter of defence {defence}", key, known)
        found.setdefault(known[key], {})[key] = value
    check(defence, found)
    return found


def purify(model: str, clean: str | Path, out: str | Path, *, probes: str | Path | None = None,
           adapter: str | Path | None = None, defences: Sequence[str] = USUAL, settings: Mapping[str, Mapping] | None = None,
           cutoff: int = 1024, tokens: int = 128, seed: int = 0, device: str = "auto") -> list[dict]:
    """Tune a language model on clean items by each defence, and write its adapter to `out/<defence>/model`.

    Args:
        model: folder in transformers' form, or a name of the hub. Weights must be safetensors; no code of it is run.
        clean: see `records`.
        probes: prompts to answer before and after; None: the first five clean ones.
        adapter: folder of the suspicious adapter on `model`, where the backdoor is in one; it is tuned further.
        defences: of `USUAL`.
        settings: by defence, fields of `TrainingSettings` and, for crow, of `Consistency`.
        cutoff: tokens of an item. tokens: most of an answer.

    Returns:
        A row per probe: prompt, `before`, and the answer after each defence, or why it failed. They are also in
        `out/answers.md`. What a killed call of the same arguments has made is taken over.

    Raises:
        ValueError: what is given cannot be used.
    """
    from cupel.text import defences as known
    from cupel.text.evaluation import tokenised
    from cupel.text.generation import answer
    from cupel.text.models import load_tokenizer
    from cupel.training.engine import finite_outputs
    from cupel.training.precision import bf16_in_hardware

    device, out = device_of(device), Path(out)
    precision = "bf16" if bf16_in_hardware(device) else "fp32"
    for name in defences:
        one_of("defence of a language model of one's own", name, USUAL)
    if surplus := sorted({*(settings or {})} - {*defences}):
        raise ValueError(f"settings are given for {', '.join(surplus)}, which is not among the defences {', '.join(defences)}")
    chosen = {name: sections(name, (settings or {}).get(name, {}), precision) for name in defences}
    items = records(clean)
    asked = records(probes, ("instruction",)) if probes else items[:5]
    base = model if Path(model).is_dir() else snapshot(model, None, ["*.json", "*.safetensors", "*.model", "*.txt"])
    tokenizer, victim = load_tokenizer(base), known.Victim(base, adapter, precision=precision, device=device)
    samples = tokenised(items, tokenizer, cutoff, True, "clean items")

    def answers(network, name: str) -> list[str]:
        with finite_outputs(network):
            rows = answer(network, tokenizer, asked, work / name / "answers.jsonl", prompt="template", max_new_tokens=tokens,
                          title=name)
        return [row["answer"] for row in rows]

    made_of = {"model": digest(base), "adapter": adapter and digest(adapter), "clean": items, "asked": asked, "chosen": chosen,
               "cutoff": cutoff, "tokens": tokens, "seed": seed, "device": device}
    with alone(out), workspace(out, made_of) as work:
        found = {"before": answers(victim.model(), "before")}
        for name, given in chosen.items():
            budget = known.Budget(samples, tokenizer.pad_token_id, derive(seed, "own", name), work / name, device)
            try:
                result = known.purify(name, victim, budget, **given)
                write_history(work / name / "history.csv", result.history)
                found[name] = answers(result.model, name)
            except Exception as error:  # the rest runs
                found[name] = [f"failed: {failure(error)}"] * len(asked)
        for name in found:
            shutil.rmtree(out / name, ignore_errors=True)
            if (work / name).is_dir():
                os.replace(work / name, out / name)
    rows = [{"prompt": item["instruction"], **{name: texts[k] for name, texts in found.items()}}
            for k, item in enumerate(asked)]
    write_text(out / "answers.md", told(rows))
    return rows


def told(rows: list[dict]) -> str:
    """Answers for a reader, prompt by prompt."""
    return "\n".join(f"## {row['prompt']}\n\n" + "".join(f"- **{name}**: {' '.join(text.split()) or '(nothing)'}\n"
                     for name, text in row.items() if name != "prompt") for row in rows)
