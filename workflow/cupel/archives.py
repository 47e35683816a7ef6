"""Zip and tar archives of publishers: regular files are read into memory by name, and nothing is unpacked to disk.

Paths, modes, owners and links in an archive play no part, so that none can write anywhere.
"""

import contextlib
import io
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

LIMIT = 1 << 28
"""Bytes of one file in an archive, at most."""


@contextlib.contextmanager
def _files(archive: Path) -> Iterator[Iterator[tuple[str, int, Callable[[], IO[bytes]]]]]:
    """Path, size and a function that opens it, of every regular file, in the order of the archive."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as pack:
                yield ((info.filename, info.file_size, partial(pack.open, info))
                       for info in pack.infolist() if not info.is_dir())
        else:
            with tarfile.open(archive) as pack:
                yield ((info.name, info.size, partial(pack.extractfile, info)) for info in pack if info.isreg())
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive}: damaged, encrypted or no archive: {type(error).__name__}: {error}") from None


def names(archive: Path) -> list[str]:
    """Paths of the regular files in an archive, in its order. Links and folders are left out."""
    with _files(archive) as found:
        return [name for name, _, _ in found]


def contents(archive: Path, members: Sequence[str], limit: int = LIMIT) -> Iterator[tuple[int, bytes]]:
    """Position in `members` and bytes of each of them, in the order of the archive: one pass, whatever the compression.

    Raises:
        ValueError: the archive is damaged, or a member has more than `limit` bytes; and, after the last one, if some of
            `members` are not regular files of the archive.
    """
    missing = {member: k for k, member in enumerate(members)}
    with _files(archive) as found:
        for name, size, opened in found:
            if name not in missing:
                continue
            if size > limit:
                raise ValueError(f"{archive}: member {name} has {size} bytes, more than the {limit} expected")
            content = io.BytesIO()
            with opened() as file:  # in blocks: the size stated may be a lie
                shutil.copyfileobj(file, content, 1 << 20)
            yield missing.pop(name), content.getvalue()
    if missing:
        raise ValueError(f"{archive}: {len(missing)} members are missing or no regular files, the first is {min(missing)}")


def read(archive: Path, *members: str) -> list[bytes]:
    """The bytes of `members`, in that order; see `contents`."""
    found = dict(contents(archive, members))
    return [found[k] for k in range(len(members))]
