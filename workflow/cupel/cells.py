"""Records of cells: what names one, its numbers on disk, and what is written in place of one whose method failed."""

import csv
import io
import json
import re
import shutil
import traceback
import zipfile
from pathlib import Path

import numpy as np

from cupel.files import atomic, digest, read_json, write_json, write_text

#: errors of the machine (memory, disk, damaged input), raised for a retry; any other is a method's, and a failed cell
MACHINE_ERRORS = (MemoryError, OSError)
#: and what libraries say of the same in errors of their own
MACHINE_WORDS = re.compile(r"out of memory|can't allocate memory|No space left|PytorchStreamWriter|CUDA (driver )?error"
                           r"|CUBLAS_STATUS|CUDNN_STATUS|os error \d", re.IGNORECASE)


def identity(spec: dict, stage: str, defence: dict | None = None) -> dict:
    """What names a cell, flat."""
    attack, _, attack_variant = spec["attack"]["name"].partition("~")
    method, _, defence_variant = (defence or {"name": ""})["name"].partition("~")
    return {"stage": stage, "dataset": spec["dataset"], "model": spec["model"], "recipe": spec["recipe"],
            "attack": attack, "attack_variant": attack_variant, "poison_rate": spec["poison_rate"], "defence": method,
            "variant": defence_variant, "budget": defence["budget"]["name"] if defence else "", "seed": spec["seed"],
            "attack_parameters": _parameters(spec["attack"]), "defence_parameters": _parameters(defence or {})}


def _parameters(method: dict) -> str:
    """What a method was given, as JSON: so that a number says with which value it was reached."""
    return json.dumps({key: value for key, value in method.items() if key not in ("name", "budget")}, sort_keys=True)


class ChangedVictim(OSError):
    """A victim's file is not the one that was measured. No fault of a method, so no cell is recorded as failed for it."""


def past(before: str | Path, model: str | Path) -> dict:
    """The record of a victim whose weights, a file or a folder, are those that it was measured with.

    Raises:
        ValueError: it failed.
        ChangedVictim: the weights are others.
    """
    record = read_json(before)
    if record["status"] != "ok":
        raise ValueError(f"its victim failed: {record['reason']}")
    if digest(model) != record["model_sha256"]:
        raise ChangedVictim(f"{model} is not the network that {before} tells of: it was changed after it was measured. Remove "
                            "the folder of the victim and run the same command again")
    return record


def failure(error: Exception) -> str:
    """A failed method in one line; the whole traceback goes to the log.

    Raises:
        Exception: the error itself, where it is the machine's.
    """
    if isinstance(error, MACHINE_ERRORS) or MACHINE_WORDS.search(str(error)):
        raise error
    traceback.print_exc()
    return " ".join(f"{type(error).__name__}: {error}".split())


def fail(error: Exception, record: dict, outputs: dict[str, str | Path]) -> None:
    """Write the outputs of a failed cell, each empty in its own form, and last `metrics` with the reason.

    Args:
        error: of the method; one of the machine's is raised.
        record: what names the cell.
        outputs: paths by name: `metrics`, checkpoints (.safetensors, which say why), tables (.csv, .parquet), arrays (.npz),
            folders.
    """
    reason = failure(error)
    for path in (Path(path) for name, path in outputs.items() if name != "metrics"):
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            with atomic(path) as temporary:
                save_file({}, temporary, metadata={"cupel": json.dumps({"format": "cupel.failed/1", "reason": reason})})
        elif path.suffix == ".csv":
            write_history(path, [])
        elif path.suffix == ".npz":
            write_tensors(path, {"failed": np.array(reason)})
        elif path.suffix == ".parquet":
            import pandas as pd

            with atomic(path) as temporary:
                pd.DataFrame({"id": []}).to_parquet(temporary)
        else:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
    write_json(outputs["metrics"], {**record, "status": "failed", "reason": reason})


def read_tensors(path: str | Path | None) -> dict[str, np.ndarray]:
    """Arrays of an `.npz`, nothing unpickled; none for no file.

    Raises:
        OSError: the file is damaged.
        ValueError: a member is no array.
    """
    if not path:
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            tensors = {key: file[key] for key in file.files}
    except (zipfile.BadZipFile, EOFError) as error:
        raise OSError(f"{path} is damaged ({error}); remove it and run the same command again") from None
    for key, value in tensors.items():
        if not isinstance(value, np.ndarray):  # numpy hands out other members as bytes
            raise ValueError(f"{path}: {key!r} is no array; expected a file written by cupel.cells.write_tensors")
    return tensors


def write_tensors(path: str | Path, tensors: dict[str, np.ndarray]) -> None:
    """Write arrays as `.npz`, atomically."""
    with atomic(path) as temporary:
        np.savez_compressed(temporary, **tensors)


def write_history(path: str | Path, rows: list[dict]) -> None:
    """Rows of a history as CSV; lists are left to JSON."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()} for row in rows)
    write_text(path, text.getvalue())
