"""What is refused, or said, before the first job: machine, paths, mirror; and the reason of a cell without result."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

from cupel import devices
from cupel.reporting.tables import gather
from tests.conftest import REPOSITORY
from tests.test_devices import Machine
from tests.test_workflow import Folder

POISON = "results/smoke/images/victims/cifar10/preactresnet18/fst/{}@0.05/seed0/poison.npz"


@pytest.mark.parametrize("name", ["two words", "it's"])
def test_a_path_that_a_shell_would_split(tmp_path, cifar10, name):
    place = tmp_path / name
    (place / "envs").mkdir(parents=True)
    for file in ("Makefile", "pyproject.toml", "envs/constraints.txt"):
        shutil.copy(REPOSITORY / file, place / file)
    made = subprocess.run(["make", "reproduce"], cwd=place, capture_output=True, text=True, check=False)
    assert made.returncode and "Snakemake cannot run Python from a path with" in made.stdout and not (place / ".venv").exists()
    # a folder may have any name, where Python has a plain one
    folder = Folder(place / "run", cifar10.parents[1].resolve())
    folder.finish("--", POISON.format("badnets"))
    (place / "python").symlink_to(os.path.realpath(sys.executable))
    path = f"{folder.path / 'workflow'}:{sysconfig.get_path('purelib')}"
    run = subprocess.run([place / "python", "-m", "snakemake", "-n"], cwd=folder.path, env={**os.environ, "PYTHONPATH": path},
                         capture_output=True, text=True, check=False)
    assert run.returncode and "The path of Python has a space, a quote or the like" in run.stdout + run.stderr


def test_a_clone_does_not_run_with_the_library_of_another(tmp_path, cifar10):
    folder = Folder(tmp_path / "run", cifar10.parents[1].resolve())
    elsewhere = {**os.environ, "PYTHONPATH": str(REPOSITORY / "workflow")}
    run = subprocess.run([sys.executable, "-m", "snakemake", "-n"], cwd=folder.path, env=elsewhere, capture_output=True,
                         text=True, check=False)
    assert run.returncode and f"export PYTHONPATH={folder.path / 'workflow'}" in run.stdout + run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_torch_cannot_use(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", Machine(tmp_path, 24000).environment["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "cannot use the GPU of this machine" in devices.check("auto") and devices.check("cpu") == ""
    with pytest.raises(RuntimeError, match=r"device: cuda is asked for, but torch .* sees no CUDA device"):
        devices.check("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.check("auto") == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_a_run_lacks_is_said_before_its_first_job(tmp_path, cifar10):
    folder = Folder(tmp_path / "run", cifar10.parents[1].resolve())
    folder.set(device="cuda")
    code, output = folder.run("--", POISON.format("badnets"))
    assert code != 0 and "Nothing was run: config.yaml: device: cuda is asked for" in output and "Traceback" not in output
    folder.set(device="cpu")
    folder.edit("workflow/papers/fst/experiment.yaml", "\ndefences:\n",
                "\nattacks:\n  blended~mine: {source: own, settings: {picture: 'mirror:mine.png'}}\n\ndefences:\n")
    code, output = folder.run("--", POISON.format("blended~mine"))
    assert code != 0 and "data.mirror is not set, and attack blended~mine reads a file of it" in output
    assert not (folder.path / "results").exists() and folder.run("-n", "--", POISON.format("blended~mine"))[0] == 0


def test_locks_that_hold_nothing(monkeypatch):
    monkeypatch.setattr(devices, "_try", lambda *_: True)
    assert not devices._locks_hold(0)


def test_locks_that_hold():
    file, place = devices._lock_file(), devices._offset("a test", str(os.getpid()))
    assert devices._try(file, place) and devices._locks_hold(place)
    os.close(file)


def test_the_reason_of_a_cell_without_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "purify.log").write_text("epoch 1\nTraceback\nMemoryError: 4 GB\n\n")
    cell = {"paper": "p", "stage": "purified", "dataset": "d", "model": "m", "recipe": "r", "attack": "a", "rate": "0.1",
            "seed": "0", "defence": "fst", "budget": "b", "folder": "nowhere"}
    found = [gather([{**cell, **more}]).iloc[0] for more in ({"logs": "logs/*.log"}, {"logs": "nothing/*.log"}, {})]
    assert [row.status for row in found] == ["failed", "not run", "not run"]
    reasons = [row.reason for row in found]
    assert list(gather([cell]).metric) == ["acc", "asr", "ra"]
    assert list(gather([{**cell, "attack": "clean", "rate": "0"}]).metric) == ["acc"]
    assert reasons == ["no result: MemoryError: 4 GB (more in logs/purify.log)", *["its job has not begun"] * 2]
