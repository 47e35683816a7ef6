"""Two runs in one folder, and runs whose predecessor was killed while it held the lock."""

import os
import signal
import time

import pytest

from tests.faults.record import shorten, trial
from tests.faults.runs import VICTIM, contents, copy, error_lines, listing, processes_in, remove
from tests.test_workflow import locked

OUTPUTS = [f"{VICTIM}/{name}" for name in ("trigger.npz", "model.safetensors", "history.csv", "metrics.json")]
TARGET = OUTPUTS[-1]
REFUSED = "Another run is active"


@pytest.fixture
def folder(undisturbed, tmp_path):
    """A finished run in which the victim is to be trained."""
    folder = copy(undisturbed, tmp_path / "run")
    remove(folder, *OUTPUTS)
    folder.others = contents(folder, sorted(listing(folder)))
    yield folder
    for pid in processes_in(folder.path, 0):
        os.kill(pid, signal.SIGKILL)


def start(folder, job=True):
    """A run, once it holds the lock, and its job (if wanted) has begun."""
    begun = time.time()
    process = folder.start("--", TARGET)
    marks = folder.path / ".snakemake" / "incomplete"
    while not locked(folder.path / "results" / ".cupel.lock") or (job and not any(
            mark.is_file() and mark.stat().st_mtime >= begun for mark in marks.rglob("*"))):
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.01)
    return process


def check(folder, undisturbed):
    """Everything is as after an undisturbed run."""
    assert contents(folder, OUTPUTS) == contents(undisturbed, OUTPUTS), "other results than undisturbed"
    assert contents(folder, folder.others) == folder.others, "results of other stages changed"
    assert listing(folder) == listing(undisturbed), f"left behind: {sorted(listing(folder) - listing(undisturbed))}"
    assert not processes_in(folder.path)


@pytest.mark.parametrize("moment", ["before its job", "during its job", "stopped (SIGSTOP)"])
def test_a_second_run(undisturbed, folder, moment):
    with trial("lock", "a second run while one is active", moment) as row:
        first = start(folder, job=moment != "before its job")
        if moment.startswith("stopped"):
            os.killpg(first.pid, signal.SIGSTOP)
        try:
            code, output = folder.run("--", TARGET)
        finally:
            os.killpg(first.pid, signal.SIGCONT)
        row.message = shorten(error_lines(output, REFUSED))
        assert code != 0 and REFUSED in output, output[-1500:]
        output, _ = first.communicate(timeout=900)
        assert first.returncode == 0, output[-2000:]
        check(folder, undisturbed)
        row.happened = "the second is refused, the first ends with identical results"


def test_two_at_the_same_moment(undisturbed, folder):
    with trial("lock", "two runs started at the same moment") as row:
        pair = [folder.start("--", TARGET) for _ in range(2)]
        ends = [(process.communicate(timeout=900)[0], process.returncode) for process in pair]
        good = [code == 0 for _, code in ends]
        assert any(good), ends
        for output, code in ends:
            assert code == 0 or REFUSED in output, output[-2000:]
            row.message = row.message or shorten(error_lines(output, REFUSED))
        check(folder, undisturbed)
        row.happened = "one runs, the other is refused or finds all done; identical results"


@pytest.mark.parametrize("moment", ["before its job", "during its job"])
def test_the_holder_is_killed(undisturbed, folder, moment):
    with trial("lock", "a run after the holder of the lock was killed with its jobs", moment) as row:
        first = start(folder, job=moment != "before its job")
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        folder.finish("--", TARGET)
        check(folder, undisturbed)
        row.happened = "runs without --unlock, identical results"


def test_the_holder_alone_is_killed(undisturbed, folder):
    """Its job lives on without it, and writes the same files as the job of the next run, at the same time."""
    with trial("lock", "a run after the holder alone was killed", "its job goes on") as row:
        first = start(folder)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        folder.finish("--", TARGET)
        first.stdout.close()
        check(folder, undisturbed)
        row.happened = "runs without --unlock, identical results"


@pytest.mark.parametrize("left", ["lock file with other content", "lock file that is read-only", "locks of Snakemake itself"])
def test_what_lies_about(undisturbed, folder, left):
    """Files of locks without a process that holds them."""
    with trial("lock", "a run where lock files lie about", left) as row:
        lock = folder.path / "results" / ".cupel.lock"
        if left == "locks of Snakemake itself":
            for name, content in (("0.input.lock", "results/x\n"), ("0.output.lock", f"{TARGET}\n")):
                (folder.path / ".snakemake" / "locks" / name).write_text(content)
        else:
            lock.write_text("12345")
            lock.chmod(0o444 if "read-only" in left else 0o644)
        code, output = folder.run("--", TARGET)
        if code and not os.access(lock, os.W_OK):  # not root: nobody can take a lock that he may not open
            row.message = shorten(error_lines(output, "Permission denied"))
            assert "Permission denied" in output
            row.happened = "clear error"
            return
        assert code == 0, output[-2000:]
        check(folder, undisturbed)
        row.happened = "runs without --unlock, identical results"
