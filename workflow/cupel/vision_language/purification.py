"""The victim asked about purified test pictures: ZIP where a diffusion model is given, else the degradations, named so."""

import tempfile
import time
from pathlib import Path

import numpy as np

from cupel import cells, job
from cupel.cells import METHOD_ERRORS
from cupel.files import write_json
from cupel.images import stages
from cupel.vision_language import data as prepared
from cupel.vision_language.stages import dtype_of, fail, measure, past

BATCH = 64  # pictures of one size that are purified together


def purified_copy(source: str | Path, folder: str | Path, change) -> None:
    """A prepared folder with the test split of another, its pictures changed.

    Args:
        source: prepared folder.
        folder: where to write.
        change: from uint8 [B, H, W, 3] to the same.
    """
    samples = prepared.load(source, "test")
    names = list(dict.fromkeys(record["image"] for record in samples.records))
    by_size: dict[tuple, list[int]] = {}
    for k, name in enumerate(names):
        by_size.setdefault(prepared.read_picture(samples.folder, name).shape, []).append(k)

    def fill(scratch: Path) -> tuple[dict[str, list[str]], str]:
        shape = next(iter(by_size))
        pictures = prepared.Pictures(scratch, len(names), shape[:2] if len(by_size) == 1 else None)
        for numbers in by_size.values():
            for first in range(0, len(numbers), BATCH):
                part = numbers[first : first + BATCH]
                changed = change(np.stack([prepared.read_picture(samples.folder, names[k]) for k in part]))
                for k, pixels in zip(part, changed, strict=True):
                    pictures.put(k, pixels)
        places = {name: pictures.reference(k) for k, name in enumerate(names)}
        return {"test": [places[record["image"]] for record in samples.records]}, pictures.close()

    records = [{key: value for key, value in record.items() if key not in ("image", "split")} for record in samples.records]
    manifest = stages.read_json(Path(source) / "manifest.json")
    prepared.write_folder(folder, {"test": records}, fill, {key: manifest[key] for key in ("name", "task", "metric")})


def purify_pictures(spec: dict, defence: dict, victim: str, before: str, source: str, triggered: str, outputs: dict,
                    device: str) -> None:
    """Purify the test pictures, untouched and triggered, and ask the victim about them.

    Args:
        spec: of the victim.
        defence: of `Plan.defence`; the function is a method of `baselines.purify`.
        victim, before: folder of its model, and its metrics.
        source, triggered: prepared folders with the two test splits.
        outputs: paths `history` (empty), `clean`, `triggered` (answers), `metrics`.
        device: `cpu` or `cuda`.
    """
    from cupel.vision_language import baselines, models

    record = cells.identity(spec, "purified", defence)
    given = dict(defence["hyperparameters"])
    try:
        known = past(before)
        started = time.perf_counter()
        if defence["function"] == "zip":
            given["model"] = baselines.diffusion(given.pop("model"), given.pop("revision", "main"), device)
        with tempfile.TemporaryDirectory(prefix=".pictures-", dir=Path(outputs["metrics"]).parent) as scratch:
            folders = [Path(scratch) / name for name in ("clean", "triggered")]
            for folder, origin in zip(folders, (source, triggered), strict=True):
                purified_copy(origin, folder, lambda pictures: baselines.purify(
                    pictures, defence["function"], seed=spec["seed"], device=device, **given))
            seconds = time.perf_counter() - started
            model = models.load(victim, dtype=dtype_of(spec), device=device)
            measured = measure(model, spec, *folders, outputs)
    except METHOD_ERRORS as error:
        fail(error, record, outputs)
        return
    cells.write_history(outputs["history"], [])
    write_json(outputs["metrics"], {
        **record, **measured, **job.peak_memory(), "status": "ok", "clean_samples": 0, "device": device,
        "rate_reached": known["rate_reached"], "seconds": seconds, "cp_before": known["cp"], "asr_before": known["asr"]})
