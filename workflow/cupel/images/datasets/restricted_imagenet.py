"""Restricted ImageNet (Tsipras et al., 2019): photographs of nine kinds of animals, each a range of ImageNet-1k classes.

It is made from a folder of the user's: `imagenet/train/<wnid>/` with all 1000 synset folders, `imagenet/val/<wnid>/`. A
class is known by its position among the sorted synset folders of `train`, because the grouping is given as ranges of
positions (proper_interpretability SPEC 4). Pictures are ordered by synset and then by file name.

A picture becomes 224×224 by plain bilinear resizing that keeps no proportions and does not smooth beforehand (the released
code's cv2.resize; equal to it up to rounding), grey ones get three equal channels, an alpha channel is dropped.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cupel.images.datasets.base import Deferred, Description, both
from cupel.sources import Source, Tree

SIZE = 224
SYNSETS = 1000
#: positions of the synsets of each class, both ends included, counted from 0
RANGES = {"dog": (151, 268), "cat": (281, 285), "frog": (30, 32), "turtle": (33, 37), "bird": (80, 100),
          "monkey": (365, 382), "fish": (389, 397), "crab": (118, 121), "insect": (300, 319)}
ENDINGS = (".jpeg", ".jpg", ".png")


def groups(synsets: Sequence[str]) -> dict[str, int]:
    """Class (its place in `RANGES`) of every synset that belongs to one, of the names of all 1000 synset folders.

    Raises:
        ValueError: another number of folders, whose positions would mean nothing.
    """
    if len(synsets) != SYNSETS:
        raise ValueError(f"{len(synsets)} synset folders in train, but the classes are ranges of positions among all "
                         f"{SYNSETS} of ImageNet-1k (those of synsets that are not used may be empty)")
    ordered = sorted(synsets)
    return {ordered[k]: c for c, (first, last) in enumerate(RANGES.values()) for k in range(first, last + 1)}


def squeeze(picture: Image.Image) -> np.ndarray:
    """uint8 [224, 224, 3] of a picture of any size and mode."""
    import torch
    import torch.nn.functional as F

    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return resized[0].round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()


def pictures(files: Sequence[Path]) -> Deferred:
    """The pictures in `files`, decoded by all cores straight into the array that they are written to."""
    def fill(out: np.ndarray) -> None:
        def one(k: int) -> None:
            try:
                with Image.open(files[k], formats=("JPEG", "PNG")) as picture:  # ImageNet has a PNG that is named .JPEG
                    out[k] = squeeze(picture)
            except OSError as error:
                raise ValueError(f"{files[k]} is not readable as a picture: {error}") from None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(one, range(len(files))))  # waits, and raises what went wrong

    return Deferred((len(files), SIZE, SIZE, 3), fill)


def read_folder(paths: list[Path]) -> dict:
    """`<folder>/train/<wnid>/*` and `<folder>/val/<wnid>/*`; `val` is the test set.

    Raises:
        ValueError: not all synsets, or one of a class without pictures in either part.
    """
    root = paths[0]
    chosen = groups([entry.name for entry in os.scandir(root / "train") if entry.is_dir()])

    def split(part: str) -> tuple:
        found = [(file, label) for synset, label in sorted(chosen.items())
                 for file in sorted((root / part / synset).glob("*")) if file.suffix.lower() in ENDINGS]
        labels = np.array([label for _, label in found], np.int64)
        missing = [name for c, name in enumerate(RANGES) if c not in labels]
        if missing:
            flat = "; pictures that lie in val itself must first be sorted into folders val/<wnid>"
            raise ValueError(f"{root / part}: no pictures of {', '.join(missing)}{flat if part == 'val' else ''}")
        return pictures([file for file, _ in found]), labels

    return both(split("train"), split("val"))


DESCRIPTION = Description(
    name="restricted_imagenet",
    classes=tuple(RANGES),
    sources=(Source("mirror", (Tree("imagenet", ("train", "val")),), read_folder),),
    shape=(SIZE, SIZE, 3),
    sizes=(None, None),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    published="the paper's networks take pixels in [0, 1] as they are",
    licence="the photographs under the terms of ImageNet",
    notes="sizes are those of the user's folder; which part of it the paper used is not known",
)
