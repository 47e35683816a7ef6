"""GPUs shared by jobs: claims of several processes on pretend devices, kills, and an out-of-memory error in a run."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
import zipfile

import pytest
import torch

from cupel import cells, devices
from cupel.checkpoint import DamagedCheckpoint
from cupel.files import read_json
from cupel.images import datasets, models
from cupel.images.datasets.base import DamagedDataset
from tests.conftest import REPOSITORY
from tests.test_workflow import Folder

JOB = """
import json, os, sys, time
from cupel import devices
megabytes, count, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
taken = devices.claim(megabytes, count)
print(json.dumps({"begin": time.monotonic(), "names": [d.name for d in taken], "seen": os.environ.get("CUDA_VISIBLE_DEVICES")}),
      flush=True)
time.sleep(seconds)
print(json.dumps({"end": time.monotonic()}), flush=True)
"""


class Machine:
    """A folder with an `nvidia-smi` that lists pretend devices of given memory."""

    def __init__(self, folder, *memory):
        self.uuids = [f"GPU-{uuid.uuid4()}" for _ in memory]
        rows = "\n".join(f"{k}, {name}, {size}" for k, (name, size) in enumerate(zip(self.uuids, memory, strict=True)))
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat << 'END'\n{rows}\nEND\n")
        tool.chmod(0o755)
        self.environment = {key: value for key, value in os.environ.items()
                            if key not in ("CUDA_VISIBLE_DEVICES", *devices.CLUSTERS)}
        self.environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY / "workflow")}

    def start(self, megabytes, seconds=60.0, count=1, **environment):
        return subprocess.Popen([sys.executable, "-c", JOB, str(megabytes), str(count), str(seconds)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                env={**self.environment, **environment})


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, 24000, 24000)


@pytest.fixture
def started():
    """Processes that are killed at the end of the test."""
    processes = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def begun(process):
    """The record that a job prints when it has its device, and what it said before."""
    said = []
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line), said
        said.append(line.strip())
    raise AssertionError("\n".join(said))


def waits(process, seconds=2.0):
    """The line by which a job says that it waits; then it goes on waiting."""
    line = process.stdout.readline()
    assert line.startswith("waiting for a GPU"), line
    time.sleep(seconds)
    assert process.poll() is None
    return line


def test_jobs_spread_then_share_then_wait(machine, started):
    for megabytes in (12000, 10000, 14000, 12000):
        started.append(machine.start(megabytes))
        record, _ = begun(started[-1])
        assert record["seen"] == record["names"][0]
        started[-1].device = record["seen"]
    assert [machine.uuids.index(job.device) for job in started] == [0, 1, 1, 0]  # all of both is taken
    started.append(machine.start(100))
    assert "has 0 of 24000 MB free" in waits(started[-1])
    started[1].kill()  # -9: nothing cleans up but the kernel
    record, said = begun(started[-1])
    assert record["seen"] == machine.uuids[1] and "after" in said[-1]


def test_never_more_than_a_device_has(machine, started):
    """Sixteen jobs in a crowd, of which some are killed: at no time do claims exceed a device."""
    sizes = [3000, 9000, 15000, 24000, 5000, 11000, 7000, 1000] * 2
    started += [machine.start(size, seconds=0.8) for size in sizes]
    records = []
    for k, job in enumerate(started):
        if k % 5 == 4:
            time.sleep(0.3)
            job.kill()
    for size, job in zip(sizes, started, strict=True):
        lines = [json.loads(line) for line in job.communicate(timeout=60)[0].splitlines() if line.startswith("{")]
        if lines and "end" in lines[-1]:
            records.append({**lines[0], **lines[-1], "size": size})
    assert len(records) >= 12
    for moment in [record["begin"] for record in records]:
        for name in machine.uuids:
            there = [r["size"] for r in records if r["seen"] == name and r["begin"] <= moment < r["end"]]
            assert sum(there) <= 24000
    assert {record["seen"] for record in records} == set(machine.uuids)


def test_a_large_job_is_not_passed_by_small_ones(tmp_path, started):
    machine = Machine(tmp_path, 8000)
    started.append(machine.start(2000, seconds=3))
    begun(started[0])
    started.append(machine.start(8000, seconds=1))
    waits(started[1], 0)
    started.append(machine.start(1000, seconds=0))  # would fit beside the first
    large, small = begun(started[1])[0], begun(started[2])[0]
    assert large["begin"] < small["begin"]


def test_a_claim_without_a_number_or_beyond_the_device_takes_it_whole(tmp_path, started):
    machine = Machine(tmp_path, 8000)
    for megabytes in (0, 90000):
        started.append(machine.start(megabytes))
        begun(started[-1])
        started.append(machine.start(100))
        waits(started[-1], 0.7)
        for job in started[-2:]:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def test_jobs_of_a_cluster_do_not_wait_for_each_other_but_one_allocation_shares(machine, started):
    def start(job):
        started.append(machine.start(20000, CUDA_VISIBLE_DEVICES="0", SLURM_JOB_ID=job))
        return started[-1]

    for job in ("71", "72"):
        assert begun(start(job))[0]["seen"] == "0"
    waits(start("72"))


def test_the_users_choice_of_devices_is_kept(tmp_path, monkeypatch):
    machine = Machine(tmp_path, 24000, 8000, 16000)
    monkeypatch.setenv("PATH", machine.environment["PATH"])

    def names(setting):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        return [(device.name, device.identity, device.memory_mb) for device in devices.visible()]

    first, _, third = machine.uuids
    assert names("2,0") == [("2", third, 16000), ("0", first, 24000)]
    assert names(third[:12]) == [(third[:12], third, 16000)]
    assert names("0,7,2") == [("0", first, 24000)]  # CUDA stops at the first that is none
    assert names("MIG-1-2") == [("MIG-1-2", "MIG-1-2", None)]
    assert names("") == names("-1") == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [device.name for device in devices.visible()] == machine.uuids


def test_two_names_of_one_device_are_one_device(machine, started):
    started.append(machine.start(20000, CUDA_VISIBLE_DEVICES="1"))
    assert begun(started[0])[0]["seen"] == "1"
    started.append(machine.start(20000, CUDA_VISIBLE_DEVICES=machine.uuids[1]))
    waits(started[1])


def test_several_devices_for_one_job(machine, started):
    started.append(machine.start(1000, count=2))
    assert begun(started[0])[0]["seen"].split(",") == machine.uuids
    started.append(machine.start(24000))
    waits(started[1], 0.7)
    started.append(machine.start(0, count=3))
    assert "ValueError: 3 GPUs are asked for, this process sees 2" in started[2].communicate(timeout=30)[0]


def test_without_a_driver_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.installed() == [] and devices.claim(1000) == []
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\nexit 9\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert devices.installed() == []


def test_the_cpu_asks_nobody(monkeypatch):
    monkeypatch.setattr(devices, "claim", lambda *_: pytest.fail("claimed"))
    assert devices.pick_device("cpu", 1, 1000) == devices.pick_device("auto", 0) == devices.pick_device("cuda", 0) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none_is_an_error():
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        devices.pick_device("cuda")
    assert devices.pick_device("auto") == "cpu"


def test_a_claim_after_cuda_has_started_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="before CUDA is used"):
        devices.claim(1000)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), MemoryError(), OSError(28, "No space left"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0; PytorchStreamWriter failed writing"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"), DamagedDataset("data/images/x is damaged"),
    DamagedCheckpoint("model.safetensors is damaged"),
], ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_what_the_machine_lacks_is_no_failed_cell(tmp_path, error):
    with pytest.raises(type(error)):
        cells.fail(error, {}, {"metrics": tmp_path / "metrics.json"})
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("read", [read_json, cells.read_tensors, models.load, lambda path: datasets.load(path.parent, "train")],
                         ids=["json", "arrays", "checkpoint", "data set"])
def test_a_damaged_input_is_no_failed_cell(tmp_path, read):
    path = tmp_path / "manifest.json"
    path.write_bytes(b"{cut off")
    with zipfile.ZipFile(tmp_path / "whole.npz", "w") as file:
        file.writestr("a.npy", "a")
    if read is cells.read_tensors:
        path.write_bytes((tmp_path / "whole.npz").read_bytes()[:-9])
    with pytest.raises(OSError, match=str(tmp_path)) as error:
        read(path)
    with pytest.raises(OSError):
        cells.failure(error.value)


@pytest.mark.parametrize("error", [
    TypeError("cannot unpack non-iterable Classifier object"), KeyError("mean"), ValueError("no"),
    RuntimeError("Input type (float) and bias type (c10::Half) should be the same"),
    RuntimeError("derivative for aten::hardsigmoid_backward is not implemented"),
], ids=repr)
def test_any_other_error_is_a_failed_cell(tmp_path, capfd, error):
    try:
        raise error
    except Exception as raised:
        cells.fail(raised, {"stage": "purified"}, {"metrics": tmp_path / "metrics.json"})
    record = read_json(tmp_path / "metrics.json")
    assert record["status"] == "failed" and record["reason"].startswith(type(error).__name__)
    assert "Traceback" in capfd.readouterr().err


PLUGIN = """
from pathlib import Path
import torch
from cupel.images.defences.base import defence

@defence("hungry")
def hungry(victim, clean, rng, *, level: int = 1):
    '''Runs out of memory the first time.'''
    marker = Path(__file__).with_name("tried")
    if not marker.exists():
        marker.touch()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB (pretended)")
    return victim, []
"""


@pytest.mark.slow
def test_a_job_without_memory_is_made_again_with_more(tmp_path, cifar10):
    folder = Folder(tmp_path / "run", cifar10.parents[1].resolve())
    (folder.path / "hungry.py").write_text(PLUGIN)
    folder.set(plugins=["hungry.py"])
    rules = folder.path / "workflow" / "rules" / "common.smk"
    rules.write_text(rules.read_text().replace('"vram_mb": vram', '"vram_mb": memory_of(vram)'))
    cell = "results/smoke/images/purified/cifar10/preactresnet18/fst/badnets@0.05/seed0/hungry@heldout/metrics.json"
    folder.finish("--", cell)
    log = next((folder.path / ".snakemake" / "log").iterdir()).read_text()
    assert (folder.path / "tried").exists() and read_json(folder.path / cell)["status"] == "ok"
    claims = [line for line in log.splitlines() if "resources:" in line and "hungry" not in line and "vram_mb" in line]
    assert "vram_mb=6000" in claims[-2] and "vram_mb=9000" in claims[-1]
