"""One run at a time in a folder of results, and jobs that outlive the run that started them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cupel import locks
from tests.conftest import REPOSITORY

RUN = """
import sys, time
from cupel.locks import hold
hold(sys.argv[1], lambda text: print(text, flush=True))
print("holds", flush=True)
time.sleep(60)
"""
JOB = """
import os, sys, time
from cupel.job import logged
with logged(sys.argv[1]):
    os.fork()  # as `separately` does
    time.sleep(60)
"""


def start(code, *arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "workflow"), **environment}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def holding(code, *arguments):
    """A process that has its locks, and is killed at the end."""
    process = start(code, *arguments)
    try:
        assert process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_clones_with_one_folder_of_results(tmp_path):
    (tmp_path / "clone").symlink_to(tmp_path)  # the same folder by another name
    with holding(RUN, tmp_path / "results"):
        second = start(RUN, tmp_path / "clone" / "results")
        assert "Another run is active in" in second.communicate(timeout=60)[0] and second.returncode
    with holding(RUN, tmp_path / "results"):
        pass


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_jobs_of_a_killed_run_are_ended(tmp_path):
    with holding(RUN, tmp_path):
        mark = tmp_path / ".cupel.jobs"
        job = start(JOB, tmp_path / "log", **{locks.JOBS: str(mark)})
        while len(locks.holders(mark)) < 2:  # the job and its child
            assert job.poll() is None
            time.sleep(0.05)
    second = start(RUN, tmp_path)
    assert "are ended" in second.stdout.readline() and second.stdout.readline() == "holds\n"
    assert job.wait(timeout=60) == -signal.SIGKILL and not locks.holders(mark)
    second.kill()
    second.communicate()


PREPARES = """
import sys, time
from cupel.locks import prepare
prepare(sys.argv[1:])
print("holds", flush=True)
time.sleep(60)
"""


def test_two_clones_that_prepare_the_same_data(tmp_path):
    """Each would remove what the other has made: Snakemake removes outputs before a job."""
    with holding(PREPARES, tmp_path / "images" / "a", tmp_path / "text" / "b"):
        second = start(PREPARES, tmp_path / "text" / "c", tmp_path / "text" / "b")
        assert f"Another run is preparing {tmp_path}/text/b" in second.communicate(timeout=60)[0] and second.returncode
        with holding(PREPARES, tmp_path / "text" / "c"):
            pass


def test_a_run_that_would_prepare_what_another_prepares_ends_before_its_first_job(tmp_path):
    from tests.test_workflow import Folder

    folder = Folder(tmp_path / "clone", tmp_path / "da ta")
    folder.set(papers=["crow"])
    with holding(PREPARES, tmp_path / "da ta" / "text" / "synthetic"):
        code, output = folder.run("--", "data")
    assert code and "Nothing was run: Another run is preparing" in output
    assert not (tmp_path / "da ta" / "language_models" / "tiny").exists()
    folder.finish("--", "data")
    assert (tmp_path / "da ta" / "text" / "synthetic" / "manifest.json").is_file()
