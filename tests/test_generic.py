"""profiles/generic through stand-ins for the commands of PBS and LSF that run jobs as processes of this machine."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import time

import pytest

from tests.conftest import REPOSITORY
from tests.test_workflow import Folder

SCRIPT = REPOSITORY / "profiles" / "generic" / "scheduler.sh"
CELLS = "results/smoke/cells.parquet"

# jobs start in the home folder, as those of the real ones do; STATE holds a file for each
PBS = {
    "qsub": """
id=$(ls "$STATE" | grep -c '\\.job$').server
while [ $# -gt 0 ]; do case $1 in -l) echo "$2" >> "$STATE/$id.asked"; shift ;; esac; shift; done
cat > "$STATE/$id.job"
cd "$HOME"
PBS_JOBID=$id setsid sh "$STATE/$id.job" > "$STATE/$id.out" 2>&1 &
echo $! > "$STATE/$id.pid"
echo $id
""",
    "qstat": """
[ -e "$STATE/down" ] && exit 111
[ -e "$STATE/$3.job" ] || exit 153
kill -0 "$(cat "$STATE/$3.pid")" 2> /dev/null && state=R || state=F
printf 'Job Id: %s\\n    Job_Name = x\\n    job_state = %s\\n' "$3" $state
""",
    "qdel": 'for id in "$@"; do kill -9 "-$(cat "$STATE/$id.pid")"; done\n',
}
LSF = {
    "bsub": """
id=$(($(ls "$STATE" | grep -c '\\.job$') + 1))
while [ $# -gt 0 ]; do case $1 in -M|-W|-gpu|-n) echo "$1 $2" >> "$STATE/$id.asked"; shift ;; esac; shift; done
cat > "$STATE/$id.job"
cd "$HOME"
LSB_JOBID=$id setsid sh "$STATE/$id.job" > "$STATE/$id.out" 2>&1 &
echo $! > "$STATE/$id.pid"
echo "Job <$id> is submitted to default queue <normal>."
""",
    "bjobs": """
[ -e "$STATE/down" ] && { echo "LSF is down. Please wait ..."; exit 255; }
[ -e "$STATE/$4.job" ] || { echo "Job <$4> is not found"; exit 255; }
kill -0 "$(cat "$STATE/$4.pid")" 2> /dev/null && echo RUN || echo EXIT
""",
    "bkill": 'for id in "$@"; do kill -9 "-$(cat "$STATE/$id.pid")"; done\n',
}


@pytest.fixture(params=["pbs", "lsf"])
def site(request, tmp_path, monkeypatch):
    """A machine with the commands of a scheduler; gives its name and the folder of its jobs."""
    for name in ("bin", "state", "home"):
        (tmp_path / name).mkdir()
    for name, text in {"pbs": PBS, "lsf": LSF}[request.param].items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text.lstrip()}")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUPEL_PATIENCE", "0")
    yield request.param, tmp_path / "state"
    for file in (tmp_path / "state").glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def ask(site, tmp_path):
    scheduler, _ = site

    def command(*arguments):
        return subprocess.run([str(SCRIPT), scheduler, *map(str, arguments)], cwd=tmp_path, check=True, text=True,
                              stdout=subprocess.PIPE).stdout.strip()

    return command


def ended(ask, job):
    for _ in range(100):
        state = ask("status", job)
        if state != "running":
            return state
        time.sleep(0.1)
    raise AssertionError("still running")


def test_exit_codes_become_states(ask, tmp_path):
    for number, (text, state) in enumerate({"exit 0": "success", "exit 3": "failed", "kill -9 $$": "failed"}.items()):
        script = tmp_path / f"job {number}.sh"
        script.write_text(f"sleep 0.5\n{text}\n")
        job = ask("submit", 1, 2000, 90, 0, script)
        assert ask("status", job) == "running"
        assert ended(ask, job) == state


def test_a_job_killed_with_all_its_processes_has_failed(ask, site, tmp_path):
    (tmp_path / "job.sh").write_text("sleep 60\n")
    job = ask("submit", 1, 2000, 90, 0, tmp_path / "job.sh")
    assert ask("status", job) == "running"
    (site[1] / "down").touch()  # no answer is no news: the job is not given up, or it would run twice
    assert ask("status", job) == "running"
    (site[1] / "down").unlink()
    ask("cancel", job)
    assert ended(ask, job) == "failed" == ended(ask, "987654")


def test_what_a_job_asks_for(ask, site, tmp_path):
    (tmp_path / "job.sh").write_text("exit 0\n")
    jobs = [ask("submit", 2, 6000, 750, gpus, tmp_path / "job.sh") for gpus in (0, 1)]
    asked = [(site[1] / f"{job}.asked").read_text().splitlines() for job in jobs]
    expected = {"pbs": ["select=1:ncpus=2:mem=6000mb", "walltime=12:30:00"], "lsf": ["-n 2", "-M 6000MB", "-W 750"]}[site[0]]
    assert asked[0] == expected
    if site[0] == "pbs":
        assert asked[1] == [f"{expected[0]}:ngpus=1", expected[1]]
    else:
        assert asked[1] == [*expected, "-gpu num=1"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("snakemake_executor_plugin_cluster_generic") is None,
                    reason="needs snakemake-executor-plugin-cluster-generic: pip install '.[cluster]'")
def test_a_run_with_a_killed_job_equals_a_local_one(site, tmp_path, cifar10):
    scheduler, state = site
    local = Folder(tmp_path / "local", cifar10.parents[1].resolve())
    local.set(papers=["fst"])
    local.finish("--", CELLS)
    folder = Folder(tmp_path / "run", cifar10.parents[1].resolve())
    folder.set(papers=["fst"])
    folder.edit("profiles/generic/profile.v9+.yaml", "scheduler.sh pbs", f"scheduler.sh {scheduler}")
    run = folder.start("--workflow-profile", "profiles/generic", "--seconds-between-status-checks", "1", "--latency-wait", "5",
                       "--", CELLS)
    log = folder.path / "logs/smoke/images/victims/cifar10/preactresnet18/fst/badnets@0.05/seed0/victim.log"
    while not log.exists():
        assert run.poll() is None, run.communicate()[0][-3000:]
        time.sleep(0.1)
    victim = next(file for file in state.glob("*.job") if "train_victim" in submitted(file))
    os.killpg(int(victim.with_suffix(".pid").read_text()), signal.SIGKILL)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output[-4000:]
    assert folder.metrics() == local.metrics() and len(local.metrics()) == 3
    asked = {}
    for file in state.glob("*.job"):
        rule = next(name for name in ("train_victim", "purify", "poison") if name in submitted(file))
        asked.setdefault(rule, []).append(file.with_suffix(".asked").read_text())
    assert sorted(map(len, asked.values())) == [1, 2, 2]  # two purified models, and the victim twice
    memory = "mem={}mb" if scheduler == "pbs" else "-M {}MB"
    assert {size for size in (4000, 6000) for text in asked["train_victim"] if memory.format(size) in text} == {4000, 6000}
    gpu = "ngpus=1" if scheduler == "pbs" else "-gpu num=1"
    assert {rule: {gpu in text for text in texts} for rule, texts in asked.items()} == {
        "train_victim": {True}, "purify": {True}, "poison": {False}}


def submitted(file):
    """The job script that was handed over, which names its rule."""
    with open(file) as job:
        script = next(line for line in job if line.startswith('sh "')).split('"')[1]
    return os.path.basename(script)
