"""Every test of this folder is of the suite `faults`; at its end the table is written."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.faults.record import GROUPS, TRIALS, markdown, with_earlier, write_csv
from tests.test_workflow import Folder


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)


def pytest_sessionfinish():
    if not TRIALS:
        return
    record = REPOSITORY / "results" / "faults" / "faults.csv"
    trials = with_earlier(record)
    write_csv(record, trials)
    if set(GROUPS) <= {row.group for row in trials}:  # a part of the suite says nothing about the whole
        (REPOSITORY / "docs" / "results" / "faults.md").write_text(markdown(trials), encoding="utf-8")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, cifar10) -> Folder:
    """A finished run at scale smoke that nothing has happened to. Tests work on copies of it."""
    folder = Folder(tmp_path_factory.mktemp("undisturbed"), cifar10.parents[1].resolve())
    folder.finish()
    return folder


@pytest.fixture(scope="session")
def undisturbed_families(tmp_path_factory, mnist) -> Folder:
    """As `undisturbed`, of the papers on language, multimodal models and robustness."""
    folder = Folder(tmp_path_factory.mktemp("families"), mnist.parents[1].resolve())
    folder.set(papers=["crow", "bye", "proper_interpretability"])
    folder.finish()
    return folder


@pytest.fixture(scope="session")
def may_mount(tmp_path_factory) -> bool:
    """Whether small file systems in memory can be mounted here."""
    place = tmp_path_factory.mktemp("mount")
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True).returncode:
        return False
    subprocess.run(["umount", place], check=True)
    return True
