"""The workflow through a real SLURM of one node: jobs submitted, killed, made again, and equal to a local run."""

import importlib.util
import os
import signal
import time

import pytest

from tests.slurm import cluster  # noqa: F401  a fixture
from tests.test_workflow import Folder

TARGET = "results/smoke/cells.parquet"
VICTIM = "victims/cifar10/preactresnet18/fst/badnets@0.05/seed0"
PURIFIED = "purified/cifar10/preactresnet18/fst/badnets@0.05/seed0"

# the profile as it is, but looking more often, and without accounting
ARGUMENTS = ["--workflow-profile", "profiles/slurm", "--slurm-status-command", "squeue", "--seconds-between-status-checks", "2",
             "--slurm-init-seconds-before-status-checks", "2", "--", TARGET]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
                       reason="needs snakemake-executor-plugin-slurm: pip install '.[cluster]'"),
]


def jobs(tool):
    """Jobs of the cluster, the finished ones too: id, state, GPUs and memory asked for, rule with wildcards."""
    columns = {"id": "jobid:20", "state": "state:20", "gpus": "tres-per-job:30", "memory": "minmemory:20",
               "comment": "comment:200"}
    table = tool("squeue", "--states=all", "--noheader", "--sort=i", f"--Format={','.join(columns.values())}")
    return [dict(zip(columns, line.split(), strict=True)) for line in table.splitlines()]


def until(condition, process, seconds=90):
    """Wait for a condition while a process runs."""
    for _ in range(seconds * 10):
        found = condition()
        if found:
            return found
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def running(tool, rule):
    return [job for job in jobs(tool) if job["comment"].startswith(f"rule_{rule}_") and job["state"] == "RUNNING"]


def test_killed_jobs_and_a_killed_run_end_as_a_local_run(cluster, tmp_path, cifar10):  # noqa: F811
    local = Folder(tmp_path / "local", cifar10.parent.resolve())
    code, output = local.run("--", TARGET)
    assert code == 0, output[-4000:]

    folder = Folder(tmp_path / "cluster", cifar10.parent.resolve())
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

    code, output = folder.run(*ARGUMENTS)
    assert code == 0, output[-4000:]
    assert len([job for job in jobs(cluster) if job["comment"].startswith("rule_train_victim_")]) == 2  # kept, not made again
    assert len(local.metrics()) == 3 and folder.metrics() == local.metrics()

    rules = {}
    for job in jobs(cluster):
        rules.setdefault(job["comment"].split("_wildcards_")[0], set()).add(job["gpus"])
    gpu = {"gres:gpu:1"}
    assert rules == {"rule_poison": {"N/A"}, "rule_train_victim": gpu, "rule_purify": gpu}  # gather_cells ran here
