"""Copies of a finished run, and what is in them."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import pandas as pd

from tests.test_workflow import TIMES, Folder

VICTIM = "results/smoke/images/victims/cifar10/preactresnet18/fst/badnets@0.05/seed0"
PURIFIED = "results/smoke/images/purified/cifar10/preactresnet18/fst/badnets@0.05/seed0"
PAPER = "results/smoke/papers/fst"
CLOCKS = (*TIMES, "samples_per_second", "seconds_per_epoch")


def copy(folder: Folder, path: Path, **settings) -> Folder:
    """A folder with all files of another, times of modification included, so that nothing in it is out of date."""
    shutil.copytree(folder.path, path, copy_function=shutil.copy2, symlinks=True)
    # files of a paper are inputs by their absolute path: Snakemake's notes would say that the set of inputs has changed
    for note in (path / ".snakemake" / "metadata").rglob("*"):
        if note.is_file():
            times = note.stat()
            note.write_bytes(note.read_bytes().replace(str(folder.path).encode(), str(path).encode()))
            os.utime(note, ns=(times.st_atime_ns, times.st_mtime_ns))
    twin = Folder.__new__(Folder)
    twin.path, twin.data = path, folder.data
    if settings:
        twin.set(**settings)
    return twin


def remove(folder: Folder, *names: str) -> None:
    """Remove files and folders by their paths in the run's folder, and what a job keeps of them for the next."""
    for name in names:
        path = folder.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
            shutil.rmtree(path.with_name("work"), ignore_errors=True)


def listing(folder: Folder, *tops: str) -> set[str]:
    """All files below `tops`, hidden ones too; what Snakemake notes about times is left out."""
    return {str(path.relative_to(folder.path)) for top in tops or ("results",) for path in (folder.path / top).rglob("*")
            if path.name != ".snakemake_timestamp" and "benchmark" not in path.parts
            and (path.is_file() or not any(path.iterdir()))}


def content(path: Path) -> str:
    """Digest of what a result says: of all its bytes, or where it tells times of a clock, of the rest."""
    if path.is_dir():
        return "+".join(f"{file.name}:{content(file)}" for file in sorted(path.iterdir())
                        if file.name != ".snakemake_timestamp")
    raw = path.read_bytes()
    if path.suffix == ".json" and isinstance(record := json.loads(raw), dict):
        record = {k: v for k, v in record.items() if k not in CLOCKS}
        if "rows" in record:
            record["rows"] = [row for row in record["rows"] if row.get("metric") not in CLOCKS]
        raw = json.dumps(record, sort_keys=True).encode()
    elif path.name == "history.csv":
        rows = csv.DictReader(io.StringIO(raw.decode()))
        raw = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
    elif path.suffix == ".parquet":
        cells = pd.read_parquet(io.BytesIO(raw))
        raw = (cells[~cells.metric.isin(CLOCKS)] if "metric" in cells else cells).to_csv().encode()
    elif path.suffix == ".ipynb":
        cells = json.loads(raw)["cells"]
        shown = [[output.get("data", output.get("text")) for output in cell.get("outputs", [])] for cell in cells]
        # pandas draws the ids of styled tables at random, and names one by its place in memory
        text = json.dumps([[cell["source"] for cell in cells], shown], sort_keys=True)
        raw = re.sub(r"T_[0-9a-f]{5}|0x[0-9a-f]{8,}", "T", text).encode()
    elif path.suffix == ".html":
        # ids of notebook cells are drawn at random; the index tells how long the rules took
        text = re.sub(r'T_[0-9a-f]{5}|id="?[\w=-]*"?', "", raw.decode())
        raw = re.sub(r"\d+\.\d+", "#", text).encode() if path.name == "index.html" else text.encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def contents(folder: Folder, names) -> dict[str, str]:
    """Name to content of those files that exist."""
    return {name: content(folder.path / name) for name in names if (folder.path / name).exists()}


def error_lines(output: str, *words: str) -> str:
    """The first line of an output that holds one of the words."""
    return next((line.strip() for line in output.splitlines() if any(word in line for word in words)), "")


def processes_in(folder: Path, patience: float = 20.0) -> list[int]:
    """Processes that work in a folder, after they had some seconds to end by themselves."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            try:
                if Path(os.readlink(link)).is_relative_to(folder):
                    found.append(int(link.parent.name))
            except OSError:  # gone meanwhile
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)
