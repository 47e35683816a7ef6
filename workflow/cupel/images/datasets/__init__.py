"""Datasets by name: `describe(name)`, `prepare(...)`, `load(folder, split)`."""

import difflib
import importlib

from cupel.images.datasets.base import FILES, Dataset, Description, load, prepare

NAMES = ("cifar10", "cifar100", "fashion_mnist", "gtsrb", "imagenette", "mnist", "restricted_imagenet",
         "tiny_imagenet")

__all__ = ["FILES", "NAMES", "Dataset", "Description", "describe", "load", "prepare"]


def describe(name: str) -> Description:
    """The description of a dataset: module `cupel.images.datasets.<name>`, attribute `DESCRIPTION`.

    Raises:
        ValueError: unknown name; the text lists the known ones.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown dataset {name!r}: known are {', '.join(NAMES)}{hint}")
    return importlib.import_module(f"cupel.images.datasets.{name}").DESCRIPTION
