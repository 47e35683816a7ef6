"""CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32×32, a hundred classes (the fine labels)."""

from pathlib import Path

from cupel import archives
from cupel.images.datasets.base import Description, both
from cupel.images.datasets.cifar10 import unpacked
from cupel.sources import Raw, Source, Url

CLASSES = tuple(Path(__file__).with_suffix(".csv").read_text(encoding="utf-8").split()[1:])  # below the heading


def read_binary(paths: list[Path]) -> dict:
    """The official binary version: records of a coarse label, a fine label and the pixels. No pickle is opened."""
    train, test = archives.read(paths[0], "cifar-100-binary/train.bin", "cifar-100-binary/test.bin")
    return both(unpacked(train, 2), unpacked(test, 2))


_BINARY = Raw("cifar-100-binary.tar.gz", "md5:03b5dce01913d631647c71ecec9e9cb8",
              Url("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"))

DESCRIPTION = Description(
    name="cifar100",
    classes=CLASSES,
    sources=(Source("official", (_BINARY,), read_binary),),
    shape=(32, 32, 3),
    sizes=(50_000, 10_000),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    published="BackdoorBench prototype settings",
    measured=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 1e-3),
    balanced=True,
    licence="none stated by the authors; cite Krizhevsky 2009",
)
