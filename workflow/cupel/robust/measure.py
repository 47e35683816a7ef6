"""Evaluation of a network as plain functions from files to files."""

import hashlib
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from cupel.cells import METHOD_ERRORS, failure, read_tensors, write_tensors
from cupel.files import atomic, digest, read_json, write_json
from cupel.images import datasets
from cupel.job import peak_memory
from cupel.robust import released
from cupel.robust.evaluations import EVALUATIONS, Subject
from cupel.robust.experiment import fraction
from cupel.robust.models import GapClassifier, load
from cupel.robust.stages import identity

ROWS = "__rows__"


class Parts:
    """Finished parts of an evaluation, in one file that is complete or absent: a killed job goes on after the last of them.

    Args:
        path: of the file.
        identity: JSON-able description; parts of any other evaluation are not used.
    """

    def __init__(self, path: str | Path, identity: dict):
        self.path, self.rows, self.arrays = Path(path), {}, {}
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        try:
            stored = read_tensors(self.path) if self.path.is_file() else {}
            known = json.loads(str(stored.pop(ROWS))) if stored else {}
        except (ValueError, OSError, KeyError, zipfile.BadZipFile):
            return
        if known.get("key") == self.key:
            self.rows, self.arrays = known["rows"], stored

    def add(self, kind: str, rows: list[dict], arrays: dict[str, np.ndarray]) -> None:
        """Keep a part."""
        self.rows[kind] = rows
        self.arrays |= {f"{kind}_{name}": value for name, value in arrays.items()}
        text = json.dumps({"key": self.key, "rows": self.rows})
        with atomic(self.path) as temporary:
            np.savez_compressed(temporary, **self.arrays, **{ROWS: np.array(text)})


def evaluate(model: GapClassifier, test: datasets.Dataset, settings: dict, *, train_eps: float, seed: int, device: str,
             parts: Parts) -> tuple[list[dict], dict[str, np.ndarray]]:
    """All parts of an evaluation.

    Args:
        model: the network.
        test: the whole test set.
        settings: `points` (count, seed, batch) and parameters by kind (`evaluations.EVALUATIONS`), run in this order.
        train_eps, seed: see :class:`Subject`.
        device: `cpu` or `cuda`.
        parts: what is done already.

    Returns:
        Rows of the tidy table, and arrays by `<kind>_<name>`.
    """
    points = {("points_seed" if key == "seed" else key): value for key, value in settings.get("points", {}).items()}
    subject = Subject.make(model, test, train_eps=train_eps, seed=seed, device=device, **points)
    for kind, parameters in settings.items():
        if kind != "points" and kind not in parts.rows:
            started = time.perf_counter()
            found = EVALUATIONS[kind](subject, **parameters)
            parts.add(kind, found.rows, found.arrays)
            print(f"{kind}: {time.perf_counter() - started:.1f} s", flush=True)
    return [row for rows in parts.rows.values() for row in rows], parts.arrays


def attack_network(spec: dict, settings: dict, data: str, model: str, before: str, outputs: dict, device: str) -> None:
    """Measure a trained network.

    Args:
        spec: of the network (`grid.Plan.training`).
        settings: of the evaluation (`grid.Plan.evaluation`).
        data: folder of prepared data sets.
        model, before: checkpoint and metrics of the network.
        outputs: paths `arrays`, `metrics`.
        device: `cpu` or `cuda`.
    """
    started, base = time.perf_counter(), identity(spec, "attacked")
    parts = Parts(Path(outputs["metrics"]).with_name("checkpoint.npz"), {"settings": settings, "model": digest(model)})
    try:
        past = read_json(before)
        if past["status"] != "ok":
            raise ValueError(f"its training failed: {past['reason']}")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows, arrays = evaluate(load(model), datasets.load(f"{data}/{spec['dataset']}", "test"), settings,
                                train_eps=fraction(spec["settings"]["inner"]["eps"]), seed=spec["seed"], device=device,
                                parts=parts)
    except METHOD_ERRORS as error:
        reason = failure(error)
        write_tensors(outputs["arrays"], {})
        write_json(outputs["metrics"], {**base, "status": "failed", "reason": reason, "metrics": ["ata"]})
        return
    write_tensors(outputs["arrays"], arrays)
    write_json(outputs["metrics"], {**base, **peak_memory(), "status": "ok", "rows": rows, "device": device,
                                    "seconds": time.perf_counter() - started})
    parts.path.unlink(missing_ok=True)


def attack_released(file: str, name: str, settings: dict, train_eps: float, data: str, output: str, device: str) -> None:
    """Measure a network that the authors released; the record is written to `output`.

    Args:
        file: pickled weights, read without executing anything (:mod:`cupel.robust.released`).
        name: `small`, `pool` or `wresnet`.
        settings: of the evaluation.
        train_eps: ε that the network was trained with.
        data: folder of the prepared data set.
        output: JSON file.
        device: `cpu` or `cuda`.

    Raises:
        NotReleased: the file holds anything but the weights of such a network.
    """
    started = time.perf_counter()
    parts = Parts(Path(output).with_suffix(".npz"), {"settings": settings, "model": digest(file)})
    rows, _ = evaluate(released.load(file, name), datasets.load(data, "test"), settings, train_eps=train_eps, seed=0,
                       device=device, parts=parts)
    write_json(output, {"file": Path(file).name, "sha256": digest(file), "status": "ok", "rows": rows, "device": device,
                        "seconds": time.perf_counter() - started})
    parts.path.unlink(missing_ok=True)
