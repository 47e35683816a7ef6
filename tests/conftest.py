"""Shared fixtures: the repository, real CIFAR-10, the optional mirror of raw files."""

import contextlib
import http.server
import importlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cupel.experiment import schema_of
from cupel.settings import check_schema

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Bitwise comparisons must not depend on how many cores the machine has."""
    torch.set_num_threads(1)


def prepared(name: str, kinds: tuple[str, ...]) -> Path:
    """Folder of a data set; prepared on first use, from the cache where it is filled."""
    from cupel.images import datasets

    folder = REPOSITORY / "data" / "images" / name
    if not (folder / "manifest.json").is_file():
        datasets.prepare(datasets.describe(name), folder, kinds=kinds)
    return folder


def planned(content: dict, scale: str = "demo", **options):
    """What one experiment file asks for, checked as `cupel.experiment.Grid` does."""
    check_schema(content, schema_of(content["family"]), "experiment.yaml")
    module = importlib.import_module(f"cupel.{content['family']}.experiment")
    return module.Experiments({content["paper"]: content}, [content["paper"]], scale, **options)


@contextlib.contextmanager
def served(handler) -> Iterator[str]:
    """A web server on the loopback interface; gives its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def cifar10() -> Path:
    return prepared("cifar10", ("official", "package", "mirror"))


@pytest.fixture(scope="session")
def mnist() -> Path:
    return prepared("mnist", ("package", "official", "mirror"))


@pytest.fixture(scope="session")
def mirror() -> Path:
    """Folder of genuine raw files, `$CUPEL_MIRROR` or ../shared/data."""
    folder = Path(os.environ.get("CUPEL_MIRROR") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs raw files of the datasets in {folder} (set CUPEL_MIRROR)")
    return folder
