"""Datasets that are archives of folders of pictures."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cupel import archives
from cupel.images.datasets.base import Deferred


def pictures(archive: Path, members: Sequence[str], size: int,
             transform: Callable[[Image.Image], Image.Image] = lambda picture: picture) -> Deferred:
    """The JPEG or PPM pictures `members` of a zip or tar, in that order, in mode RGB (grey ones get three equal channels).

    `transform` is applied to each, and makes images of height and width `size`, in pixels.
    """
    def fill(out: np.ndarray) -> None:
        for k, content in archives.contents(archive, members):
            with Image.open(io.BytesIO(content), formats=("JPEG", "PPM")) as picture:
                image = np.asarray(transform(picture.convert("RGB")))
            if image.shape != out.shape[1:]:
                raise ValueError(f"{archive}: {members[k]} has the shape {image.shape}, expected {out.shape[1:]}")
            out[k] = image

    return Deferred((len(members), size, size, 3), fill)


def found(archive: Path, pattern: str) -> list[re.Match]:
    """The regular files of an archive whose whole path is of that form, in its order."""
    return [match for match in map(re.compile(pattern).fullmatch, archives.names(archive)) if match]


def centre(picture: Image.Image, shorter: int, size: int) -> Image.Image:
    """The picture with its shorter side at `shorter` pixels (bilinear, with antialiasing), and of that the centre.

    Args:
        size: of the centre, in pixels a side.
    """
    scale = shorter / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def labels(of: Sequence[str], index: Mapping[str, int]) -> np.ndarray:
    """Class indices, int64 [N], of the class identifiers `of`.

    Raises:
        ValueError: an identifier that is not in `index`.
    """
    unknown = set(of) - set(index)
    if unknown:
        raise ValueError(f"unknown class {min(unknown)}")
    return np.array([index[name] for name in of], np.int64)
