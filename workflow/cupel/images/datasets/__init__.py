"""Datasets by name: `describe(name)`, `prepare(...)`, `load(folder, split)`."""

import importlib

from cupel.images.datasets.base import FILES, Dataset, Description, load, prepare
from cupel.registry import unknown

NAMES = ("cifar10", "cifar100", "fashion_mnist", "gtsrb", "imagenette", "mnist", "restricted_imagenet",
         "tiny_imagenet")

__all__ = ["FILES", "NAMES", "Dataset", "Description", "describe", "load", "prepare"]


def describe(name: str) -> Description:
    """The description of a dataset: module `cupel.images.datasets.<name>`, attribute `DESCRIPTION`.

    Raises:
        ValueError: unknown name; the text lists the known ones.
    """
    if name not in NAMES:
        raise ValueError(unknown("dataset", name, NAMES))
    return importlib.import_module(f"cupel.images.datasets.{name}").DESCRIPTION
