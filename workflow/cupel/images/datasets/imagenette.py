"""Imagenette (Howard, fast.ai; version 2): 9,469 + 3,925 photographs of ten easily told classes of ImageNet.

The archive with the shorter side at 320 pixels is used. No paper reproduced here says how the pictures become
224×224: the shorter side is resized to 256 pixels (bilinear with antialiasing) and the centre of 224×224 is cut out,
the usual evaluation transform of ImageNet. Pictures are ordered by class and then by file name.
"""

from pathlib import Path

from PIL import Image

from cupel.images.datasets import folders
from cupel.images.datasets.base import Description, both
from cupel.sources import Raw, Source, Url

SIZE = 224
SHORTER_SIDE = 256
WNIDS = ("n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413",
         "n03445777", "n03888257")


def centre(picture: Image.Image) -> Image.Image:
    """The picture with its shorter side at 256 pixels, and of that the centre of 224×224."""
    return folders.centre(picture, SHORTER_SIDE, SIZE)


def read_folders(paths: list[Path]) -> dict:
    """The official form: `<imagenette2...>/{train,val}/<wnid>/<name>.JPEG`; `val` is the test set."""
    found = folders.found(paths[0], r"imagenette2[^/]*/(train|val)/(n\d{8})/[^/]+\.JPEG")
    index = {wnid: c for c, wnid in enumerate(WNIDS)}

    def split(part: str) -> tuple:
        chosen = sorted((match[2], match[0]) for match in found if match[1] == part)
        return (folders.pictures(paths[0], [name for _, name in chosen], SIZE, centre),
                folders.labels([wnid for wnid, _ in chosen], index))

    return both(split("train"), split("val"))


_OFFICIAL = Raw("imagenette2-320.tgz", "md5:3df6f0d01a2c9592104656642f5e78a3",
                Url("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"))
_EXCERPT = Raw("imagenette_excerpt_224.zip", "sha256:028b8db8b07c4534052477790873baa7a6137a5f3fb42aeb59b93915b5ac5ffc")

DESCRIPTION = Description(
    name="imagenette",
    classes=("tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
             "gas pump", "golf ball", "parachute"),
    sources=(Source("official", (_OFFICIAL,), read_folders),),
    shape=(SIZE, SIZE, 3),
    sizes=(9_469, 3_925),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    published="statistics of ImageNet-1K; no paper reproduced here states any for Imagenette",
    counts=((963, 955, 993, 858, 941, 956, 961, 931, 951, 960), (387, 395, 357, 386, 409, 394, 389, 419, 399, 390)),
    licence="Apache-2.0 for the selection (fast.ai); the photographs under the terms of ImageNet",
    notes=f"shorter side resized to {SHORTER_SIDE} pixels, then the centre of {SIZE}×{SIZE}: a choice made here",
    excerpts=(Source("mirror", (_EXCERPT,), read_folders),),
)
