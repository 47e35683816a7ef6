"""Files that are whole or absent: atomic writes, checksums, extraction of single named members."""

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, on error remove it.

    The temporary name keeps the suffix, because many writers choose their format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
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
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def extract(archive: str | Path, member: str, destination: str | Path, limit: int = 1 << 32) -> Path:
    """Copy one regular member of a tar or zip archive to `destination`, atomically.

    Only the bytes of the member named are taken: its path, mode, owner and links play no part.

    Raises:
        ValueError: the archive has no such regular file, or it is larger than `limit` bytes.
    """
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(archive):
            pack = stack.enter_context(zipfile.ZipFile(archive))
            if member not in pack.namelist():
                raise ValueError(f"{archive}: no member {member}")
            size, source = pack.getinfo(member).file_size, stack.enter_context(pack.open(member))
        else:
            pack = stack.enter_context(tarfile.open(archive))
            try:
                info = pack.getmember(member)
            except KeyError:
                raise ValueError(f"{archive}: no member {member}") from None
            if not info.isreg():
                raise ValueError(f"{archive}: member {member} is not a regular file")
            size, source = info.size, stack.enter_context(pack.extractfile(info))
        if size > limit:
            raise ValueError(f"{archive}: member {member} has {size} bytes, more than the {limit} expected")
        with atomic(destination) as temporary, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    return Path(destination)
