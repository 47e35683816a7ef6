"""Datasets of pictures with questions or captions, one file each: `describe(name)`, `prepare(...)`, `load(folder, split)`."""

import importlib
import pkgutil

from cupel.registry import one_of
from cupel.vision_language.datasets.base import Description, prepare
from cupel.vision_language.prepared import load

#: made by the pipeline: their modules have a `prepare` of their own
GENERATED = ("shapes", "tiles")
NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))

__all__ = ["GENERATED", "NAMES", "Description", "describe", "load", "prepare"]


def describe(name: str) -> Description:
    """The description of a dataset: module `cupel.vision_language.datasets.<name>`, attribute `DESCRIPTION`.

    Raises:
        ValueError: unknown name; the text lists the known ones.
    """
    one_of("dataset", name, NAMES)
    return importlib.import_module(f"cupel.vision_language.datasets.{name}").DESCRIPTION
