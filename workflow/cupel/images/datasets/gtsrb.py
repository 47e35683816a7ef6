"""GTSRB, the German Traffic Sign Recognition Benchmark (Stallkamp et al., 2012): 39,209 + 12,630 pictures, 43 signs.

The pictures have 15 to 250 pixels a side. Each is taken whole (the frame around the sign stays) and resized to 32×32
without keeping its proportions, bilinear with antialiasing, as PIL does it. Training pictures are ordered by class and
then by file name, that is by track and frame: the 30 frames of a track show one sign while the car drives up to it.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from cupel import archives
from cupel.images.datasets import folders
from cupel.images.datasets.base import Description, both
from cupel.sources import Raw, Source, Url

SIZE = 32
with Path(__file__).with_suffix(".csv").open(encoding="utf-8") as _file:
    _SIGNS = list(csv.DictReader(_file))
CLASSES = tuple(row["sign"] for row in _SIGNS)


def _resized(picture: Image.Image) -> Image.Image:
    return picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def read_official(paths: list[Path]) -> dict:
    """The official archives: training pictures, test pictures, test labels.

    Training: `GTSRB/Final_Training/Images/<class>/<track>_<frame>.ppm`. Test: `GTSRB/Final_Test/Images/<number>.ppm`,
    with classes in `GT-final_test.csv` (columns separated by semicolons).
    """
    train, test, truth = paths
    train_found = sorted((match[0], match[1]) for match in folders.found(
        train, r"GTSRB/Final_Training/Images/(\d{5})/\d{5}_\d{5}\.ppm"))
    test_members = sorted(match[0] for match in folders.found(test, r"GTSRB/Final_Test/Images/\d{5}\.ppm"))
    tables = [name for name in archives.names(truth) if Path(name).name == "GT-final_test.csv"]
    if len(tables) != 1:
        raise ValueError(f"{truth}: {len(tables)} files GT-final_test.csv instead of one")
    rows = csv.DictReader(archives.read(truth, tables[0])[0].decode().splitlines(), delimiter=";")
    class_of = {row["Filename"]: row["ClassId"] for row in rows}
    index = {str(c): c for c in range(len(CLASSES))}
    try:
        test_classes = [class_of[Path(name).name] for name in test_members]
    except KeyError as error:
        raise ValueError(f"{truth}: no class for the test picture {error}") from None
    return both((folders.pictures(train, [name for name, _ in train_found], SIZE, _resized),
                 folders.labels([str(int(number)) for _, number in train_found], index)),
                (folders.pictures(test, test_members, SIZE, _resized), folders.labels(test_classes, index)))


def read_npz(paths: list[Path]) -> dict:
    """One file with all images at 32×32 and, as `train_files`, the file names of the training pictures."""
    with np.load(paths[0], allow_pickle=False) as arrays:
        order = np.lexsort((arrays["train_files"], arrays["train_labels"]))
        return both((arrays["train_images"][order], arrays["train_labels"][order]),
                    (arrays["test_images"], arrays["test_labels"]))


_SITE = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_OFFICIAL = tuple(Raw(name, f"md5:{md5}", Url(_SITE + name)) for name, md5 in (
    ("GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3"),
    ("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
    ("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
))
_NPZ = Raw("gtsrb_32x32.npz", "sha256:9dd4a061554688350ba5f9bb27ead06ad8543de05d4ff9683ab3ae551cd83390")
_EXCERPT = Raw("gtsrb_native_excerpt.zip", "sha256:46acf3e5c7f44c4e7bc30a77fa7d952e861657523ecf75ba6009fbb01f98b096")

DESCRIPTION = Description(
    name="gtsrb",
    classes=CLASSES,
    sources=(Source("official", _OFFICIAL, read_official), Source("mirror", (_NPZ,), read_npz)),
    shape=(SIZE, SIZE, 3),
    sizes=(39_209, 12_630),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    published="not normalised in BackdoorBench, FST and IMS",
    # the way of resizing moves the standard deviation in the third digit
    measured=((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669), 0.015),
    counts=tuple(tuple(int(row[split]) for row in _SIGNS) for split in ("train", "test")),
    licence="free for research as commonly stated; cite Stallkamp et al. 2012",
    notes="the official archives and the npz differ in how they were resized, so pixels of the two are not equal",
    excerpts=(Source("mirror", (_EXCERPT,), lambda paths: read_official(paths * 3)),),
)
