"""One run at a time in a folder of results, and jobs that outlive the run that started them."""

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


def test_two_clones_with_one_folder_of_results(tmp_path):
    (tmp_path / "clone").symlink_to(tmp_path)  # the same folder by another name
    first = start(RUN, tmp_path / "results")
    assert first.stdout.readline() == "holds\n"
    second = start(RUN, tmp_path / "clone" / "results")
    assert "Another run is active in" in second.communicate(timeout=60)[0] and second.returncode
    first.kill()
    first.wait()
    third = start(RUN, tmp_path / "results")
    assert third.stdout.readline() == "holds\n"
    third.kill()
    third.communicate()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_jobs_of_a_killed_run_are_ended(tmp_path):
    first = start(RUN, tmp_path)
    assert first.stdout.readline() == "holds\n"
    mark = tmp_path / ".cupel.jobs"
    job = start(JOB, tmp_path / "log", **{locks.JOBS: str(mark)})
    while len(locks.holders(mark)) < 2:  # the job and its child
        assert job.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    second = start(RUN, tmp_path)
    assert "are ended" in second.stdout.readline() and second.stdout.readline() == "holds\n"
    assert job.wait(timeout=60) == -signal.SIGKILL and not locks.holders(mark)
    second.kill()
    second.communicate()
