"""Evaluation of a network as plain functions from files to files."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cupel.cells import fail, failure, past, read_tensors, write_tensors
from cupel.files import digest, workspace, write_json
from cupel.images import datasets
from cupel.job import costs
from cupel.limits import check
from cupel.robust import released
from cupel.robust.evaluations import Found, Subject, evaluation
from cupel.robust.experiment import fraction
from cupel.robust.models import GapClassifier, load
from cupel.robust.stages import identity
from cupel.training.engine import finite_outputs


def evaluate(model: GapClassifier, test: datasets.Dataset, spec: dict, work: Path,
             device: str) -> tuple[list[dict], dict[str, np.ndarray]]:
    """All parts of an evaluation on a whole test set: rows of the tidy table, and arrays by `<kind>_<name>`.

    Args:
        spec: `settings`, `points` (count, seed, batch_size) and parameters by kind (:mod:`cupel.robust.evaluations`), run in
            this order; `train_eps` and `seed`, see :class:`Subject`.
        work: folder for finished parts; those that lie there are taken over.

    Raises:
        ValueError: a parameter is wrong.
        TypeError: what is registered as an evaluation returns something else.
    """
    settings = dict(spec["settings"])
    points = {("points_seed" if key == "seed" else key): value for key, value in settings.pop("points", {}).items()}
    subject = Subject.make(model, test, train_eps=spec["train_eps"], seed=spec["seed"], device=device, **points)
    rows, arrays = [], {}
    for kind, parameters in settings.items():
        part = work / f"{kind}.npz"
        if not part.is_file():
            started = time.perf_counter()
            check("robust", "evaluations", kind, evaluation.find(kind), parameters)
            with finite_outputs(subject.model):
                found = evaluation.find(kind)(subject, **parameters)
            if not isinstance(found, Found):
                raise TypeError(f"evaluation {kind!r} must return Found(rows, arrays), but returned {type(found).__name__}")
            write_tensors(part, {**found.arrays, "rows": np.array(json.dumps(found.rows))})
            print(f"{kind}: {time.perf_counter() - started:.1f} s", flush=True)
        stored = read_tensors(part)
        rows += json.loads(str(stored.pop("rows")))
        arrays |= {f"{kind}_{name}": value for name, value in stored.items()}
    return rows, arrays


@dataclass(frozen=True)
class Network:
    """A trained network: folder of prepared data sets, its checkpoint, its metrics."""

    data: str
    model: str
    before: str


def attack_network(spec: dict, settings: dict, network: Network, outputs: dict, device: str) -> None:
    """Measure a trained network, by `Experiments.training` and `Experiments.evaluation`; outputs: `arrays`, `metrics`."""
    started = time.perf_counter()
    base = identity(spec, "attacked") | {"attack_parameters": json.dumps(settings, sort_keys=True)}
    asked = {"settings": settings, "train_eps": fraction(spec["settings"]["inner"]["eps"]), "seed": spec["seed"]}
    try:
        past(network.before, network.model)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        test = datasets.load(f"{network.data}/{spec['dataset']}", "test")
        with workspace(Path(outputs["metrics"]).parent, {**asked, "model": digest(network.model)}) as work:
            rows, arrays = evaluate(load(network.model), test, asked, work, device)
            write_tensors(outputs["arrays"], arrays)
            write_json(outputs["metrics"], {**base, **costs(), "status": "ok", "rows": rows, "device": device,
                                            "seconds": time.perf_counter() - started})
    except Exception as error:
        write_tensors(outputs["arrays"], {})
        fail(error, {**base, "metrics": ["ata"]}, {"metrics": outputs["metrics"]})


def attack_released(spec: dict, file: str, data: str, output: str, device: str) -> None:
    """Measure a network Small that the authors released, by `Experiments.released`; the record is written to `output`.

    The pickled weights in `file` are read without executing anything; `data` is the folder of the prepared data set. A file
    that holds anything but such a network, or weights that are not finite (as some have), is recorded as failed.
    """
    started, record = time.perf_counter(), {"file": Path(file).name, "sha256": digest(file), "device": device}
    with workspace(Path(output).with_suffix(""), {**spec, "model": record["sha256"]}) as work:
        try:
            rows, _ = evaluate(released.load(file, "small"), datasets.load(data, "test"), {**spec, "seed": 0}, work, device)
            record |= {"status": "ok", "rows": rows}
        except Exception as error:
            record |= {"status": "failed", "reason": failure(error), "rows": []}
        write_json(output, {**record, "seconds": time.perf_counter() - started})
    work.parent.rmdir()
