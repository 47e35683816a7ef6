"""Evaluation of a network as plain functions from files to files."""

import hashlib
import json
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cupel.cells import METHOD_ERRORS, failure, read_tensors, write_tensors
from cupel.files import atomic, digest, read_json, write_json
from cupel.images import datasets
from cupel.job import peak_memory
from cupel.robust import released
from cupel.robust.evaluations import Subject, evaluation
from cupel.robust.grid import fraction
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
        settings: `points` (count, seed, batch_size) and parameters by kind (:mod:`cupel.robust.evaluations`), in the order
            in which they are run.
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
            found = evaluation.find(kind)(subject, **parameters)
            parts.add(kind, found.rows, found.arrays)
            print(f"{kind}: {time.perf_counter() - started:.1f} s", flush=True)
    return [row for rows in parts.rows.values() for row in rows], parts.arrays


@dataclass(frozen=True)
class Network:
    """A trained network: folder of prepared data sets, its checkpoint, its metrics."""

    data: str
    model: str
    before: str


def attack_network(spec: dict, settings: dict, network: Network, outputs: dict, device: str) -> None:
    """Measure a trained network.

    Args:
        spec: of the network (`Plan.training`).
        settings: of the evaluation (`Plan.evaluation`).
        network: where it lies.
        outputs: paths `arrays`, `metrics`.
        device: `cpu` or `cuda`.
    """
    started, base = time.perf_counter(), identity(spec, "attacked")
    parts = Parts(Path(outputs["metrics"]).with_name("checkpoint.npz"), {"settings": settings, "model": digest(network.model)})
    try:
        past = read_json(network.before)
        if past["status"] != "ok":
            raise ValueError(f"its training failed: {past['reason']}")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        test = datasets.load(f"{network.data}/{spec['dataset']}", "test")
        rows, arrays = evaluate(load(network.model), test, settings, train_eps=fraction(spec["settings"]["inner"]["eps"]),
                                seed=spec["seed"], device=device, parts=parts)
    except METHOD_ERRORS as error:
        reason = failure(error)
        write_tensors(outputs["arrays"], {})
        write_json(outputs["metrics"], {**base, "status": "failed", "reason": reason, "metrics": ["ata"]})
        return
    write_tensors(outputs["arrays"], arrays)
    write_json(outputs["metrics"], {**base, **peak_memory(), "status": "ok", "rows": rows, "device": device,
                                    "seconds": time.perf_counter() - started})
    parts.path.unlink(missing_ok=True)


def attack_released(spec: dict, file: str, data: str, output: str, device: str) -> None:
    """Measure a network Small that the authors released; the record is written to `output`.

    Args:
        spec: `settings` of the evaluation, and `train_eps`, ε that the network was trained with (`Plan.released`).
        file: pickled weights, read without executing anything (:mod:`cupel.robust.released`).
        data: folder of the prepared data set.
        output: JSON file.
        device: `cpu` or `cuda`.

    Raises:
        NotReleased: the file holds anything but the weights of such a network.
    """
    started = time.perf_counter()
    parts = Parts(Path(output).with_suffix(".npz"), {"settings": spec["settings"], "model": digest(file)})
    rows, _ = evaluate(released.load(file, "small"), datasets.load(data, "test"), spec["settings"],
                       train_eps=spec["train_eps"], seed=0, device=device, parts=parts)
    write_json(output, {"file": Path(file).name, "sha256": digest(file), "status": "ok", "rows": rows, "device": device,
                        "seconds": time.perf_counter() - started})
    parts.path.unlink(missing_ok=True)
