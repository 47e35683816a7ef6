"""Poisoned training sets and triggered test sets, written as prepared folders (bye SPEC 3.2 and 3.4).

What a defence may see is the folder's records and pictures: ids stay as they were, each record has one answer, the names of
the pictures say nothing, and every picture, clean or triggered, is stored by the same writer from decoded pixels. Which
samples are poisoned stands in `poison.json` beside them and is read by `truth` alone, for scoring and the oracle.

Pictures are named or packed in random order. A poisoned sample has a picture of its own, also where clean samples share
one: this the attack itself brings about.
"""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from cupel.files import read_json
from cupel.limits import check
from cupel.rng import rng
from cupel.vision_language.prepared import Pictures, about, copy_test, load, read_picture, without, write_folder
from cupel.vision_language.triggers import stamp, trigger

TARGET = "Backdoor Attack!"  # bye SPEC 3.2


def poisoned_count(poison_rate: float, total: int) -> int:
    """K = ⌊rate · total⌋ (bye SPEC 3.2: 621 of 6,218 at 10 %), of the rate as written: 0.29 of 100 is 29.

    Raises:
        ValueError: the rate is not in [0, 1].
    """
    if not 0 <= poison_rate <= 1:
        raise ValueError(f"poison rate {poison_rate}: a fraction from 0 to 1 is expected")
    return math.floor(Fraction(str(poison_rate)) * total)


def poisoned_indices(poison_rate: float, total: int, seed: int) -> np.ndarray:
    """int64 [K], ascending: uniform without replacement. Those of a lower rate are among those of a higher one."""
    return np.sort(rng(seed, "poison", "indices").permutation(total)[: poisoned_count(poison_rate, total)])


def poison(source: str | Path, folder: str | Path, *, function: str, poison_rate: float, seed: int, target: str = TARGET,
           parameters: dict | None = None) -> dict:
    """Poison the training split of a prepared folder, in place: N stays, K samples get the trigger and the target.

    The samples poisoned depend on the seed and the rate alone, so that triggers are compared on the same ones.

    Args:
        source: a prepared folder with the split `train`.
        folder: where to write `train.jsonl`, the pictures, `manifest.json` and `poison.json`.
        function, parameters: of a trigger, see `cupel.vision_language.triggers`.
        poison_rate: share of the samples, from 0 (a clean copy) to 1.
        seed: of the samples, of the trigger where it has random parts, and of the order of pictures.
        target: the answer of poisoned samples.

    Returns:
        The content of `poison.json`: function, parameters, poison_rate, seed, target, total, count, indices, ids, and
        unchanged, the ids whose picture the trigger does not change (a black square on black).

    Raises:
        ValueError: unknown trigger or parameter, an impossible rate, or a trigger that changes no picture.
        FileNotFoundError: `source` is not prepared.
    """
    source, parameters = Path(source), trigger.settings(function, parameters or {})
    check("vision_language", "attacks", function, trigger.find(function), parameters)
    samples = load(source, "train")
    kept, manifest = about(source)
    indices = poisoned_indices(poison_rate, len(samples), seed)
    bad = set(indices.tolist())
    # one entry for each picture to write: of clean samples, which may share it, and of each poisoned sample
    wanted = [("poisoned", k) if k in bad else ("clean", record["image"]) for k, record in enumerate(samples.records)]
    distinct = list(dict.fromkeys(wanted))
    row_of = dict(zip(distinct, rng(seed, "poison", "rows").permutation(len(distinct)).tolist(), strict=True))
    unchanged = []

    def fill(pictures: Pictures) -> None:
        for (kind, what), row in row_of.items():
            if kind == "clean":
                pictures.take(row, source, what)
                continue
            record, before = samples[what], samples.image(what)
            after = stamp(function, before, seed, record["id"], **parameters)
            if np.array_equal(before, after):
                unchanged.append(record["id"])
            pictures.put(row, after)
        _changed(len(indices), len(unchanged))

    # the other references of a caption would tell that the target is none of them: training needs one answer
    records = [without(record, "image", "split", "answers") | {"row": row_of[entry]} | ({"answer": target} if k in bad else {})
               for k, (record, entry) in enumerate(zip(samples.records, wanted, strict=True))]
    made = {"function": function, "parameters": parameters, "poison_rate": poison_rate, "seed": seed, "target": target,
            "total": len(samples), "count": len(indices), "indices": indices.tolist(),
            "ids": [samples[k]["id"] for k in indices], "unchanged": unchanged, "source_sha256": manifest["content_sha256"]}
    write_folder(folder, {"train": records}, fill, extra=lambda: {"poison.json": made}, **kept)
    return made


def trigger_test(source: str | Path, folder: str | Path, *, function: str, seed: int, target: str = TARGET,
                 parameters: dict | None = None) -> dict:
    """Write a triggered copy of every picture of the test split; questions and true answers stay.

    It depends on trigger and seed, not on the poison rate. Where samples share a picture they share its copy: a trigger at
    a random place has one place per picture.

    Arguments are those of `poison`, and the content of `poison.json` is too, but that `unchanged` is the number of samples
    whose picture the trigger does not change.
    """
    source, parameters = Path(source), trigger.settings(function, parameters or {})
    check("vision_language", "attacks", function, trigger.find(function), parameters)
    samples = load(source, "test")
    made = {"function": function, "parameters": parameters, "seed": seed, "target": target, "total": len(samples),
            "source_sha256": about(source)[1]["content_sha256"]}
    same = set()

    def fill(pictures: Pictures, names: list[str]) -> None:
        for row, image in enumerate(names):
            before = read_picture(source, image)
            after = stamp(function, before, seed, image, **parameters)
            if np.array_equal(before, after):
                same.add(image)
            pictures.put(row, after)
        _changed(len(names), len(same))
        made["unchanged"] = sum(sample["image"] in same for sample in samples.records)

    copy_test(source, folder, fill, lambda: {"poison.json": made})
    return made


def _changed(asked: int, unchanged: int) -> None:
    if asked and unchanged == asked:
        raise ValueError(f"the trigger changes no pixel of any of {asked} pictures")


def truth(folder: str | Path) -> np.ndarray:
    """Which training samples of a poisoned folder are poisoned: bool [N]. For scoring and the oracle, never for a defence."""
    record = read_json(Path(folder) / "poison.json")
    poisoned = np.zeros(record["total"], bool)
    poisoned[record["indices"]] = True
    return poisoned
