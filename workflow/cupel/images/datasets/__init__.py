"""Datasets by name: `describe(name)`, `prepare(...)`, `load(folder, split)`. A plugin adds one by a function:

    @dataset("mine")
    def mine() -> Description: ...
"""

import importlib

from cupel.images.datasets.base import FILES, Dataset, Description, load, prepare
from cupel.registry import Registry, one_of

NAMES = ("cifar10", "cifar100", "fashion_mnist", "gtsrb", "imagenette", "mnist", "restricted_imagenet",
         "tiny_imagenet")

#: the decorator for functions of plugins that describe a data set; those of the library are `NAMES`
dataset = Registry("dataset", "cupel.images.datasets")

__all__ = ["FILES", "NAMES", "Dataset", "Description", "dataset", "describe", "load", "prepare"]


def describe(name: str) -> Description:
    """The description of a dataset: a plugin's, or `DESCRIPTION` of the module `cupel.images.datasets.<name>`.

    Raises:
        ValueError: unknown name; the text lists the known ones.
    """
    if name in dataset:
        return dataset[name]()
    one_of("dataset", name, (*NAMES, *dataset))
    return importlib.import_module(f"cupel.images.datasets.{name}").DESCRIPTION
