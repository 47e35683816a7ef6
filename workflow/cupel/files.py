"""Files that are whole or absent: atomic writes, checksums, work that a killed job leaves to the next."""

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file, read in blocks, or of the files in a folder with their names; hidden ones, which Snakemake leaves
    in its outputs, do not count."""
    if Path(path).is_dir():
        files = {file.name: digest(file, algorithm) for file in Path(path).iterdir() if not file.name.startswith(".")}
        return hashlib.new(algorithm, json.dumps(files, sort_keys=True).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file or folder until `handle` is closed or its process ends; False where that cannot be had."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or a network file system that knows no locks
        return False
    return True


def _sweep(folder: Path, prefix: str, suffix: str) -> None:
    """Remove temporary files and folders of that name whose process was killed: nobody holds their lock any more."""
    name = re.compile(re.escape(prefix) + "[a-z0-9_]{8}" + re.escape(suffix))
    for path in folder.glob(".*"):
        if not name.fullmatch(path.name):
            continue
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile
            continue
        try:
            if _lock(handle, wait=False):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _temporary(make: Callable[[], str], folder: Path, prefix: str, suffix: str) -> Iterator[Path]:
    """The path that `make` creates, held by a lock for as long as the block runs."""
    _sweep(folder, prefix, suffix)
    while True:
        path = Path(make())
        handle = os.open(path, os.O_RDONLY)
        _lock(handle, wait=True)
        if path.exists():  # else another process took it for left behind, in the moment before the lock
            break
        os.close(handle)
    try:
        yield path
    finally:
        os.close(handle)


@contextlib.contextmanager
def scratch(folder: str | Path, prefix: str) -> Iterator[Path]:
    """Yield a temporary folder in `folder`, removed at the end. What killed processes left under `prefix` goes first."""
    folder = Path(folder)
    with _temporary(lambda: tempfile.mkdtemp(prefix=prefix, dir=folder), folder, prefix, "") as path:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, on error remove it.

    The temporary name keeps the suffix, because many writers choose their format by it. What a killed process left of the
    same file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def make() -> str:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        return name

    with _temporary(make, path.parent, f".{path.stem}.", path.suffix) as temporary:
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # mkstemp makes private files; results are as readable as any other file of the user
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, sorted keys, so that equal content is an equal file. NaN is refused."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: there is none, or it is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is damaged ({error}); remove it and run the same command again") from None


def benchmarks(folder: str | Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Benchmark files of Snakemake below a folder, sorted, each with the row of its job; those without one are left out."""
    for path in sorted(Path(folder).rglob("*.tsv")):
        with open(path, newline="", encoding="utf-8") as lines:
            row = next(csv.DictReader(lines, delimiter="\t"), None)
        if row:
            yield path, row


class Damaged(OSError, ValueError):
    """A file cannot be read: no method's fault, so no failed cell."""


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Around a library that reads a file or a folder and says in errors of its own that it is damaged.

    Raises:
        Damaged: in their place.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, ValueError, EOFError) as error:
        raise Damaged(f"{path} cannot be read ({' '.join(str(error).split())}); where it is damaged, remove it and run the "
                      "same command again") from None


def noted(path: Path) -> Any:
    """What a note in JSON says; None where there is none or it cannot be read."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def kept(folder: Path, identity: Mapping) -> Path:
    """The folder `work` in `folder`: as an earlier job with the same identity left it, or new."""
    work, marked = folder / "work", folder / "work" / "identity.json"
    key = {"sha256": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}
    if noted(marked) != key:
        shutil.rmtree(work, ignore_errors=True)
        write_json(marked, key)
    return work


@contextlib.contextmanager
def workspace(folder: Path, identity: Mapping) -> Iterator[Path]:
    """A folder that a killed job leaves to the next one with the same identity; it goes when the job is done."""
    work = kept(folder, identity)
    yield work
    shutil.rmtree(work)


def link(source: Path, destination: Path) -> None:
    """Give a file a second name, or copy it where no hard link can be. What had that name before goes."""
    destination.unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def publish(made: Path, path: Path) -> None:
    """Give a finished file its name in the results as well; where there are no hard links it moves. Its time is now."""
    os.utime(made)
    if path.exists() and path.samefile(made):
        return
    link = path.with_name(f".{path.name}.new")
    link.unlink(missing_ok=True)
    try:
        os.link(made, link)
    except OSError:
        link = made
    os.replace(link, path)
