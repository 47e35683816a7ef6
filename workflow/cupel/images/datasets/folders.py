"""Datasets that are archives of folders of pictures: members are read one by one, nothing is unpacked to disk."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cupel.images.datasets.base import Deferred


def names(archive: Path) -> list[str]:
    """Paths of the regular files in a zip or tar archive, in its order. Links and folders are left out."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as pack:
            return [info.filename for info in pack.infolist() if not info.is_dir()]
    with tarfile.open(archive, "r:*") as pack:
        return [info.name for info in pack if info.isreg()]


def contents(archive: Path, members: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    """Position in `members` and bytes of each of them, in the order of the archive (one pass through a tar).

    Raises:
        ValueError: after the last one, if some of `members` are not regular files of the archive.
    """
    position = {member: k for k, member in enumerate(members)}
    missing = set(members)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as pack:
            for info in pack.infolist():
                if info.filename in missing:
                    missing.remove(info.filename)
                    yield position[info.filename], pack.read(info)
    else:
        with tarfile.open(archive, "r:*") as pack:
            for info in pack:
                if info.isreg() and info.name in missing:
                    missing.remove(info.name)
                    yield position[info.name], pack.extractfile(info).read()
    if missing:
        raise ValueError(f"{archive}: {len(missing)} members are missing, the first is {min(missing)}")


def text(archive: Path, member: str) -> str:
    """One member as text (UTF-8)."""
    [(_, content)] = contents(archive, [member])
    return content.decode()


def pictures(archive: Path, members: Sequence[str], size: int,
             transform: Callable[[Image.Image], Image.Image] = lambda picture: picture) -> Deferred:
    """The pictures `members` of an archive as RGB images, grey ones with three equal channels.

    Args:
        archive: zip or tar with JPEG or PPM members.
        members: their paths, in the order wanted.
        size: height and width of an image after `transform`, in pixels.
        transform: applied to each picture in mode RGB.
    """
    def fill(out: np.ndarray) -> None:
        for k, content in contents(archive, members):
            with Image.open(io.BytesIO(content), formats=("JPEG", "PPM")) as picture:
                image = np.asarray(transform(picture.convert("RGB")))
            if image.shape != out.shape[1:]:
                raise ValueError(f"{archive}: {members[k]} has the shape {image.shape}, expected {out.shape[1:]}")
            out[k] = image

    return Deferred((len(members), size, size, 3), fill)


def labels(of: Sequence[str], index: Mapping[str, int]) -> np.ndarray:
    """Class indices, int64 [N], of the class identifiers `of`.

    Raises:
        ValueError: an identifier that is not in `index`.
    """
    unknown = set(of) - set(index)
    if unknown:
        raise ValueError(f"unknown class {min(unknown)}")
    return np.array([index[name] for name in of], np.int64)
