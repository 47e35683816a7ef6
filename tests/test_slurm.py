"""The workflow through a real SLURM of one node: jobs submitted, killed, requeued, made again, and equal to a local run."""

import importlib.util
import os
import signal
import time

import pytest

from tests.slurm import cluster  # noqa: F401  a fixture
from tests.test_workflow import Folder

TARGET = "results/smoke/cells.parquet"
VICTIM = "images/victims/cifar10/preactresnet18/fst/badnets@0.05/seed0"
PURIFIED = "images/purified/cifar10/preactresnet18/fst/badnets@0.05/seed0"

# the profile as it is, but looking more often, and without accounting
ARGUMENTS = ["--workflow-profile", "profiles/slurm", "--slurm-status-command", "squeue", "--seconds-between-status-checks", "2",
             "--slurm-init-seconds-before-status-checks", "2", "--slurm-partition-config", "partitions.yaml", "--", TARGET]
PARTITIONS = "partitions: {main: {max_gpu: 0}, accelerated: {max_gpu: 2}}\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
                       reason="needs snakemake-executor-plugin-slurm: pip install '.[cluster]'"),
]


def jobs(tool):
    """Jobs of the cluster, the finished ones too: partition, GPUs and memory asked for, restarts, rule with wildcards."""
    columns = {"id": "jobid:20", "state": "state:20", "partition": "partition:20", "gpus": "tres-per-job:30",
               "memory": "minmemory:20", "restarts": "restartcnt:10", "comment": "comment:200"}
    table = tool("squeue", "--states=all", "--noheader", "--sort=i", f"--Format={','.join(columns.values())}")
    return [dict(zip(columns, line.split(), strict=True)) for line in table.splitlines()]


def until(condition, process, seconds=300):
    """Wait for a condition while a process runs."""
    for _ in range(seconds * 10):
        found = condition()
        if found:
            return found
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"waited {seconds} s in vain\n{process.communicate()[0][-4000:]}")


def running(tool, rule):
    return [job for job in jobs(tool) if job["comment"].startswith(f"rule_{rule}_") and job["state"] == "RUNNING"]


def test_killed_jobs_and_a_killed_run_end_as_a_local_run(cluster, tmp_path, cifar10):  # noqa: F811
    local = Folder(tmp_path / "local", cifar10.parents[1].resolve())
    local.set(papers=["fst"])
    local.finish("--", TARGET)

    folder = Folder(tmp_path / "cluster", cifar10.parents[1].resolve())
    folder.set(papers=["fst"])
    (folder.path / "partitions.yaml").write_text(PARTITIONS)
    logs = folder.path / "logs" / "smoke"
    run = folder.start(*ARGUMENTS)
    # a job that is cancelled while its script runs is submitted again, with more memory
    until(lambda: (logs / VICTIM / "victim.log").exists(), run)
    cancelled = running(cluster, "train_victim")[0]
    cluster("scancel", cancelled["id"])
    # Snakemake itself dies while jobs run; they go on, and the user cancels them
    until(lambda: list((logs / PURIFIED).glob("*/purify.log")), run)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    victims = [job for job in jobs(cluster) if job["comment"].startswith("rule_train_victim_")]
    assert [job["state"] for job in victims] == ["CANCELLED", "COMPLETED"]
    assert [job["memory"] for job in victims] == ["4000M", "6000M"]
    assert running(cluster, "purify")
    cluster("scancel", "--user=root")

    # the node of a job fails: SLURM itself puts the job back into the queue, and Snakemake waits on
    run = folder.start(*ARGUMENTS)
    requeued = until(lambda: running(cluster, "purify"), run)[0]
    cluster("scontrol", "requeue", requeued["id"])
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output[-4000:]
    (again,) = [job for job in jobs(cluster) if job["id"] == requeued["id"]]
    assert (again["state"], again["restarts"]) == ("COMPLETED", "1")
    assert len([job for job in jobs(cluster) if job["comment"].startswith("rule_train_victim_")]) == 2  # kept, not made again
    assert len(local.metrics()) == 3 and folder.metrics() == local.metrics()

    rules = {}
    for job in jobs(cluster):
        rules.setdefault(job["comment"].split("_wildcards_")[0], set()).add((job["gpus"], job["partition"]))
    gpu = {("gres:gpu:1", "accelerated")}
    assert rules == {"rule_poison": {("N/A", "main")}, "rule_train_victim": gpu, "rule_purify": gpu}  # gather_cells ran here
