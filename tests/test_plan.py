"""The plan of a scale: jobs against Snakemake's own table, times against sums by hand."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cupel import plan
from cupel.plan import Cost, Job
from cupel.reporting.timing import critical_path
from tests.conftest import REPOSITORY
from tests.test_workflow import Folder, jobs

CHIP = "a chip, 2 cores, 4 GB"
FIVE = ["fst", "ims", "bye", "crow", "proper_interpretability"]


def cell(**wildcards):
    return frozenset(wildcards.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cifar10):
    made = Folder(tmp_path_factory.mktemp("plan"), cifar10.parents[1].resolve())
    made.set(papers=FIVE, jobs="victim")
    shutil.rmtree(made.path / "workflow")  # planned in this process, whose library it has to be
    (made.path / "workflow").symlink_to(REPOSITORY / "workflow")
    return made


@pytest.fixture(scope="module")
def graph(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.path)
        return plan.graph({}, 2)


def test_jobs_are_those_of_snakemake(folder, graph):
    found = Counter(job.rule for job in graph[0] if job.todo)
    table = Counter()
    for rule, count in jobs(folder.run("-n", "-q", "rules")[1]).items():
        table["purify" if rule.startswith("purify_fst_") or rule.startswith("purify_ims_") else rule] += count
    assert found == table - Counter(["all"])
    assert {job.rule for job in graph[0] if not job.todo} >= {"prepare_images"}  # cifar10 is there
    job = next(job for job in graph[0] if job.rule == "purify")
    assert job.cells == 2 and job.gpu and dict(job.wildcards)["dataset"] == "cifar10" and "defence" not in dict(job.wildcards)
    assert "train_victim" in {graph[0][place].rule for place in job.after}
    assert not next(job for job in graph[0] if job.rule == "poison").gpu


def test_what_reads_arrays_asks_for_them(graph):
    """They may have been deleted to save room, with their manifest left."""
    for rule in ("feature_maps", "contact_sheet", "poison", "purify"):
        job = next(job for job in graph[0] if job.rule == rule)
        assert "prepare_images" in {graph[0][place].rule for place in job.after}, rule


def test_benchmark_files_are_found(folder, graph, monkeypatch):
    monkeypatch.chdir(folder.path)
    victim, purify = (next(job for job in graph[0] if job.rule == rule) for rule in ("train_victim", "purify"))
    index = next(job for job in graph[0] if job.rule == "index")
    other = victim.benchmark.replace("/smoke/", "/demo/")
    texts = {victim.benchmark: "s\th:m:s\n8.5\t0:00:08\n", other: "s\n60\n", purify.benchmark: "s\n6\n", index.benchmark: "s\n"}
    for name, text in texts.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    assert sorted(plan.measured("results", "smoke", *graph), key=lambda cost: cost.seconds) == [
        Cost("purify", "smoke", purify.wildcards, 2, 6), Cost("train_victim", "smoke", victim.wildcards, 1, 8.5),
        Cost("train_victim", "demo", victim.wildcards, 1, 60)]
    monkeypatch.setenv("PYTHONPATH", str(folder.path / "workflow"))  # beside it lies no table of costs
    run = subprocess.run([sys.executable, "-m", "cupel.plan", "--papers", "fst", "--write", "costs.csv"], capture_output=True,
                         text=True, check=True)
    rows = {line.split("|")[0].strip(): [cell.strip() for cell in line.split("|")[1:]] for line in run.stdout.splitlines()}
    assert rows["train_victim"] == ["1", "0", "yes", "8.5 s", "1", "8.5 s"]
    assert rows["purify"] == ["1 (2 cells)", "0", "yes", "3.0 s a cell", "1", "6.0 s"]
    assert rows["index"] == ["1", "0", "", "", "0", "1 unknown"] and rows["prepare_images"][:2] == ["0", "1"]
    assert len(plan.read_costs("costs.csv")) == 3


@pytest.mark.parametrize(("chosen", "sentence"), [
    (["--scale", "smok"], "scale: 'smok' is not allowed; allowed are smoke, demo, desk, bench, paper"),
    (["--papers", "ftt"], "unknown paper 'ftt'.*did you mean 'fst'"),
    (["--papers", "ims_inner_step", "--scale", "paper"],
     "ims_inner_step has no scale 'paper'; it has smoke, desk, bench")])
def test_what_is_not_there_is_refused_at_once(folder, monkeypatch, chosen, sentence):
    monkeypatch.chdir(folder.path)
    monkeypatch.setattr(plan, "graph", None)
    with pytest.raises(SystemExit, match=sentence) as caught:
        plan.main(chosen)
    assert "\n" not in caught.value.code  # a text: the exit status is 1


def test_the_time_of_a_job_is_that_of_the_nearest_measured():
    def cost(seconds, attack, rate, seed):
        wildcards = cell(dataset="cifar10", model="resnet18", attack=attack, rate=rate, seed=seed)
        return Cost("train_victim", "demo", wildcards, 1, seconds)

    costs = [cost(1, "badnets", "0.1", "0"), cost(3, "badnets", "0.1", "1"), cost(50, "badnets", "0.05", "0"),
             cost(100, "bpp", "0.1", "0")]
    times = plan.Times("demo", costs, CHIP)

    def seconds(**changes):
        wildcards = {"dataset": "cifar10", "model": "resnet18", "attack": "badnets", "rate": "0.1", "seed": "2", **changes}
        return times.of(Job("train_victim", cell(**wildcards)))

    assert seconds() == 2 and seconds(rate="0.2") == 3  # the median of two, of three
    assert seconds(attack="sig") == (3 + 50) / 2  # of all four
    assert seconds(dataset="gtsrb") is None and times.of(Job("poison")) is None


def test_which_measurements_are_used():
    def used(*costs):
        costs = [Cost("index", scale, cell(), 1, place, where) for place, (scale, where) in enumerate(costs)]
        times = plan.Times("bench", costs, CHIP)
        return [cost.seconds for cost in times.used["index"]], times.of(Job("index"))

    assert used(("demo", ""), ("bench", "other"), ("bench", CHIP)) == ([2], 2)  # this scale first, then this machine
    assert used(("bench", "b"), ("bench", "a")) == ([1], 1)  # never two machines together
    assert used(("bench", CHIP), ("bench", ""), ("", "")) == ([1, 2], 1.5)  # no scale: the same at all
    assert used(("smoke", ""), ("demo", ""), ("demo", CHIP)) == ([1], None)  # shown, and counted nowhere


def test_sums_by_hand():
    train = Job("train", threads=2, gpu=True, after=(0,))
    graph = [Job("prepare", todo=False), train, train, Job("purify", cells=3, gpu=True, after=(1,)),
             Job("report", after=(2, 3)), Job("odd")]
    costs = [Cost("prepare", "", cell(), 1, 1e6), Cost("train", "demo", cell(), 1, 100), Cost("train", "demo", cell(), 1, 200),
             Cost("purify", "demo", cell(), 2, 60, CHIP), Cost("report", "paper", cell(), 1, 1e6)]
    text = plan.show(graph, plan.Times("demo", costs, ""), 4)
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]
    assert rows[1:] == [["prepare", "0", "1", "", "277.8 h", "1", ""],
                        ["odd", "1", "0", "", "", "0", "1 unknown"],
                        ["train", "2", "0", "yes", "2 min (2 min to 3 min)", "2", "5 min"],
                        ["purify", "1 (3 cells)", "0", "yes", "30 s a cell *", "1", "90 s"],
                        ["report", "1", "0", "", "277.8 h at paper", "1", "1 unknown"]]
    assert "5 jobs to run, 1 done. Of those to run 3 ask for a GPU" in text and "The time of 3 is known, of 2 unknown." in text
    # two threads of 150 s each, twice, and 90 s; one of the two and the 90 s wait for each other
    assert "like the one below, 4 cores: at least 4 min. 0.19 core-hours, 0.11 h of them in jobs that ask for a GPU." in text
    assert f"measured on {CHIP};" in text
    assert max(plan.ends(graph, [0, 150, 150, 90, 0, 0])) == 240
    assert "core-hours" not in plan.show(graph, plan.Times("bench", costs[1:], ""), 4)  # nothing is made up
    text = plan.show(graph, plan.Times("demo", costs, "", gpu=False), 4)
    assert "core-hours" not in text and "meant for GPUs, and none is seen here" in text


def test_costs_are_kept_in_a_table(tmp_path):
    first = Cost("purify", "demo", cell(dataset="mnist", seed="0"), 2, 1.5, CHIP)
    plan.write_costs(tmp_path / "costs.csv", [first, Cost("index", "demo", cell(), 1, 2, CHIP)])
    new = Cost("index", "demo", cell(), 1, 3, CHIP)
    plan.write_costs(tmp_path / "costs.csv", [new])
    assert plan.read_costs(tmp_path / "costs.csv") == [new, first]
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a table of costs"):
        plan.read_costs(tmp_path / "x.csv")


def test_committed_costs_are_of_rules_that_exist(graph):
    assert {cost.rule for cost in plan.read_costs(plan.COSTS)} <= set(graph[1])


def test_the_longest_chain_of_a_run(tmp_path):
    """Poison (2 s), two victims (30 and 50 s), their defences (40 and 5 s), a page: 2 + 30 + 40 is longest."""
    files = {name: tmp_path / "benchmark" / "desk" / f"{name}.tsv" for name in "abcdef"}
    rules = {"a": "poison", "b": "train_victim", "c": "train_victim", "d": "purify", "e": "purify", "f": "index"}
    after = {"a": (), "b": (0,), "c": (0,), "d": (1,), "e": (2,), "f": (3, 4)}
    jobs = [Job(rules[name], cell(attack="badnets", rate="0.01", seed="1"), benchmark=str(file), after=after[name])
            for name, file in files.items()]
    for name, seconds in zip("abcde", (2, 30, 50, 40, 5), strict=True):
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].write_text(f"s\tmax_rss\n{seconds}\t10\n")
    folder = tmp_path / "benchmark" / "desk"
    assert critical_path(folder) == []
    plan.keep_graph(folder, jobs)
    assert plan.kept_graph(folder) == jobs
    path = critical_path(folder)
    assert [step["job"] for step in path] == [f"{kind}  BadNets 1 %, seed 1" for kind in ("poison", "victim", "defence")]
    assert [(step["begin"], step["seconds"]) for step in path] == [(0, 2), (2, 30), (32, 40)]
