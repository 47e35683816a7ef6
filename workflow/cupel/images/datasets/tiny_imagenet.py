"""Tiny-ImageNet (Stanford CS231n): 100,000 + 10,000 images of 64×64, two hundred classes of ImageNet.

The labels of the official test pictures were never published, so the validation set is the test set, as in
BackdoorBench, FST and IMS. Classes have the order of `wnids.txt`. Training pictures are ordered by class and then by
the number in their file name, validation pictures by that number: the papers' loaders keep the order in which the file
system lists them, which is not reproducible.
"""

import csv
from pathlib import Path

from cupel import archives
from cupel.images.datasets import folders
from cupel.images.datasets.base import Description, both
from cupel.sources import Raw, Source, Url

SIZE = 64
# identifier and first name of each class, in the order of wnids.txt of the whole dataset
with Path(__file__).with_suffix(".csv").open(encoding="utf-8") as _file:
    NAME = {row["wnid"]: row["name"] for row in csv.DictReader(_file)}


def read_zip(paths: list[Path]) -> dict:
    """The official form, whole or any part of its classes; a class keeps the index it has in the whole.

    `tiny-imagenet-200/wnids.txt` lists the classes; pictures are `train/<wnid>/images/<wnid>_<number>.JPEG` and
    `val/images/val_<number>.JPEG`, the class of the latter stands in `val/val_annotations.txt` (separated by tabs).
    """
    root, archive = "tiny-imagenet-200/", paths[0]
    index = {wnid: c for c, wnid in enumerate(NAME)}
    wnids, annotations = archives.read(archive, f"{root}wnids.txt", f"{root}val/val_annotations.txt")
    present = folders.labels(wnids.decode().split(), index)
    class_of = dict(line.split("\t")[:2] for line in annotations.decode().splitlines() if line)

    train = folders.found(archive, rf"{root}train/(n\d{{8}})/images/\1_(\d+)\.JPEG")
    train.sort(key=lambda match: (index.get(match[1], -1), int(match[2])))
    test = folders.found(archive, rf"{root}val/images/(val_(\d+)\.JPEG)")
    test.sort(key=lambda match: int(match[2]))
    unlabelled = [match[1] for match in test if match[1] not in class_of]
    if unlabelled:
        raise ValueError(f"{archive}: val_annotations.txt does not have {unlabelled[0]}")

    train_labels = folders.labels([match[1] for match in train], index)
    test_labels = folders.labels([class_of[match[1]] for match in test], index)
    for split, labels in (("train", train_labels), ("test", test_labels)):
        if set(labels.tolist()) != set(present.tolist()):
            raise ValueError(f"{archive}: the classes of the {split} pictures are not those of wnids.txt")
    return both((folders.pictures(archive, [match[0] for match in train], SIZE), train_labels),
                (folders.pictures(archive, [match[0] for match in test], SIZE), test_labels))


_OFFICIAL = Raw("tiny-imagenet-200.zip", "md5:90528d7ca1a48142e341f4ef8d21d0de",
                Url("http://cs231n.stanford.edu/tiny-imagenet-200.zip"))
_EXCERPT = Raw("tiny-imagenet-10.zip", "sha256:461e25dfbb317beb4bfbde82de322c2a3d292de94a8ba001da8740395db3f057")

DESCRIPTION = Description(
    name="tiny_imagenet",
    classes=tuple(NAME.values()),
    sources=(Source("official", (_OFFICIAL,), read_zip),),
    shape=(SIZE, SIZE, 3),
    sizes=(100_000, 10_000),
    mean=(0.4802, 0.4481, 0.3975),
    std=(0.2302, 0.2265, 0.2262),
    published="BackdoorBench prototype settings; std is the mean over images of the deviation within an image",
    balanced=True,
    licence="none stated; the photographs under the terms of ImageNet",
    excerpts=(Source("mirror", (_EXCERPT,), read_zip),),
)
