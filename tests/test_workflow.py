"""The workflow as a user runs it: end to end at scale smoke on real slices, reruns, kills, and wrong settings."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import REPOSITORY

TIMES = ("seconds", "train_seconds", "peak_memory_mb", "peak_vram_mb")


FIVE = "papers=[fst,ims,bye,crow,proper_interpretability]"
#: other papers: a folder with this file alone, which uses what others of the family define and adds a defence
THIRD = """
paper: third
family: images
title: Another paper
defences:
  ft~slow: {label: FT at a low rate, function: ft, source: own, settings: {lr: 0.001, epochs: 1}}
scales:
  smoke:
    seeds: [0]
    blocks:
      - {datasets: [cifar10], models: [preactresnet18], recipe: fst, attacks: [badnets], rates: [0.05], budgets: [heldout],
         defences: [fst, ft~slow]}
"""

THIRD_TEXT = """
paper: third_text
family: text
title: Another paper on language models
defences:
  magnitude~tenth: {label: A tenth pruned, function: magnitude, source: own, settings: {pruning: {sparsity: 0.1}}}
scales:
  smoke:
    seeds: [0]
    blocks:
      - {datasets: [negsentiment], models: [tiny], recipe: crow, attacks: [badnets], rates: [0.5], budgets: [few],
         defences: [crow, magnitude~tenth]}
"""
THIRD_VISION_LANGUAGE = """
paper: third_vision_language
family: vision_language
title: Another paper on vision-language models
defences:
  random_drop~half: {label: Half dropped, kind: filter, function: random_drop, source: own, settings: {share: 0.5}}
scales:
  smoke:
    seeds: [0]
    filters: [bye, random_drop~half]
    blocks:
      - {datasets: [shapes_tiny], models: [micro_llava], recipe: micro_lora, attacks: [square~quarter], rates: [0.2],
         defences: [bye, random_drop~half]}
"""


class Folder:
    """A copy of the repository to run in."""

    def __init__(self, path: Path, data: Path):
        self.path, self.data = path, data
        path.mkdir(parents=True, exist_ok=True)
        for name in ("Snakefile", "config.yaml", "profiles", "workflow"):
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, path / name)
        self.set(scale="smoke", data={"folder": str(data)}, seeds=[0])

    def set(self, **changes):
        config = yaml.safe_load((self.path / "config.yaml").read_text())
        config.update(changes)
        (self.path / "config.yaml").write_text(yaml.safe_dump(config))

    def add_paper(self, key, experiment):
        (self.path / "workflow" / "papers" / key).mkdir()
        (self.path / "workflow" / "papers" / key / "experiment.yaml").write_text(experiment)

    def edit(self, file, old, new):
        path = self.path / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def start(self, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(self.path / "workflow"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
        return subprocess.Popen(command, cwd=self.path, env=environment, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)

    def run(self, *arguments):
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output

    def finish(self, *arguments):
        """What a run says that must end well."""
        code, output = self.run(*arguments)
        assert code == 0, output[-4000:]
        return output

    def metrics(self):
        found = {}
        for path in sorted((self.path / "results").rglob("metrics.json")):
            if path.parent.name != "work":
                record = json.loads(path.read_text())
                found[str(path.relative_to(self.path))] = {k: v for k, v in record.items() if k not in TIMES}
        return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cifar10):
    folder = Folder(tmp_path_factory.mktemp("run"), cifar10.parents[1].resolve())
    folder.add_paper("third", THIRD)
    folder.set(papers=["fst", "third"])
    output = folder.finish()
    assert not re.search("Exception|Traceback", output), output[-4000:]
    return folder


def test_smoke_ends_with_the_report(finished):
    results = finished.path / "results" / "smoke"
    page = (results / "index.html").read_text()
    assert "A small run" in page and "FST" in page and "triggers_cifar10.png" in page
    cells = pd.read_parquet(results / "cells.parquet")
    assert set(cells.status) == {"ok"} and set(cells.defence) == {"", "ft", "fst"}
    assert set(cells[cells.paper == "third"].variant) == {"", "slow"}
    assert {"acc", "asr", "ra", "der"} <= set(cells.metric) and (cells[cells.metric == "asr"].n == 180).all()
    made = json.loads((results / "provenance.json").read_text())
    assert made["seeds"] == [0] and "torch" in made["versions"] and made["data"]["images/cifar10"]["content_sha256"]
    for name in ("report.html", "report.ipynb", "card.md", "features.svg", "features.csv", "claims.csv", "tables/cells.csv"):
        assert (results / "papers" / "fst" / name).stat().st_size > 0
    for name in ("report.html", "tables", "figures", "claims.csv"):
        assert (results / "papers" / "third" / name).exists(), "a paper is a folder with experiment.yaml"
    assert len(pd.read_csv(results / "claims.csv")) >= 7
    for name in ("claims.html", "cells.html", "cross.html", "cross/ranks.csv"):
        assert (results / name).stat().st_size > 0
    assert cells.path.str.removeprefix("results/smoke/").map((results / "cells.html").read_text().__contains__).mean() > 0.5


def test_nothing_is_done_twice(finished):
    assert "Nothing to be done" in finished.finish("-n")


def jobs(output):
    """Rule to number of jobs in the table of a dry run."""
    lines = output.split("Job stats:")[1].splitlines()[3:]
    table = {}
    for line in lines:
        parts = line.split()
        if len(parts) != 2 or parts[0] == "total":
            break
        table[parts[0]] = int(parts[1])
    return table


@pytest.mark.parametrize("scale", ["smoke", "demo", "bench", pytest.param("paper", marks=pytest.mark.slow)])
def test_no_path_is_of_two_rules(tmp_path, cifar10, scale):
    """Every function of every rule that could make a path is called, and none of them complains."""
    folder = Folder(tmp_path / "strict", cifar10.parents[1].resolve())
    strict = ("--strict-dag-evaluation", "functions", "--quiet", "rules")
    output = folder.finish("-n", *strict, "--config", FIVE, f"scale={scale}")
    assert not re.search("Exception|Traceback|Error", output), output[-3000:]


def test_a_paper_that_has_not_all_scales_may_stand_first(tmp_path, cifar10):
    folder = Folder(tmp_path / "first", cifar10.parents[1].resolve())
    assert jobs(folder.finish("-n", "-q", "rules", "--config", "papers=[breadth,fst]", "scale=desk"))["report_paper"] == 2


def test_a_paper_is_a_folder_in_every_family(tmp_path, cifar10):
    folder = Folder(tmp_path / "papers", cifar10.parents[1].resolve())
    for key, text in (("third", THIRD), ("third_text", THIRD_TEXT), ("third_vision_language", THIRD_VISION_LANGUAGE)):
        folder.add_paper(key, text)
    folder.set(papers=["third", "third_text", "third_vision_language"])
    output = folder.finish("-n", "--strict-dag-evaluation", "functions")
    assert not re.search("Exception|Traceback", output), output[-3000:]
    planned = jobs(output)
    assert (planned["purify"], planned["purify_text"], planned["refit"], planned["report_paper"]) == (2, 2, 2, 3)


def test_a_hyperparameter_reruns_what_depends_on_it(finished):
    file = "workflow/papers/fst/experiment.yaml"
    finished.edit(file, "{alpha: 0.2, lr: 0.01, epochs: 10, batch_size: 128, momentum: 0.9, projected: true",
                  "{alpha: 0.3, lr: 0.01, epochs: 10, batch_size: 128, momentum: 0.9, projected: true")
    planned = jobs(finished.run("-n")[1])
    finished.edit(file, "alpha: 0.3", "alpha: 0.2")
    assert planned["purify"] == 1 and "train_victim" not in planned and "poison" not in planned


def test_code_of_a_defence_reruns_its_cells_only(finished):
    file = "workflow/cupel/images/defences/fst.py"
    finished.edit(file, "pushed away from", "pushed  away from")  # in a docstring: nothing changes its meaning
    assert "Nothing to be done" in finished.run("-n")[1]
    finished.edit(file, "pushed  away from", "pushed away from")
    finished.edit(file, "*, alpha=0.2", "*, alpha=0.3")
    planned = jobs(finished.run("-n")[1])
    finished.edit(file, "*, alpha=0.3", "*, alpha=0.2")
    assert planned["purify"] == 1 and "train_victim" not in planned


def test_a_claim_is_judged_again_and_nothing_is_drawn_or_trained(finished):
    file = "workflow/papers/fst/claims.yaml"
    finished.edit(file, "margin: 0.1}", "margin: 0.2}")
    planned = jobs(finished.run("-n")[1])
    finished.edit(file, "margin: 0.2}", "margin: 0.1}")
    os.utime(finished.path / "results/smoke/papers/fst/claims.csv")
    assert {"judge_claims", "index"} <= set(planned) <= {"judge_claims", "index", "notebook", "paper_page", "all"}


def test_one_cell_by_its_path(finished):
    path = "results/smoke/images/purified/cifar10/preactresnet18/fst/blended@0.1/seed3/lp@heldout/metrics.json"
    finished.finish("--", path)
    record = json.loads((finished.path / path).read_text())
    assert (record["attack"], record["poison_rate"], record["seed"], record["defence"]) == ("blended", 0.1, 3, "lp")
    shutil.rmtree(finished.path / "results/smoke/images/purified/cifar10/preactresnet18/fst/blended@0.1")
    shutil.rmtree(finished.path / "results/smoke/images/victims/cifar10/preactresnet18/fst/blended@0.1")


def test_plugins_of_the_documentation(finished, tmp_path):
    """The worked examples of docs/extending.md, as printed there: a new attack and a new defence, by path."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "extending.md").read_text(), re.DOTALL)
    folder = Folder(tmp_path / "plugin", finished.data)
    (folder.path / "my_methods.py").write_text("\n\n".join(blocks))
    folder.set(plugins=["my_methods.py"], papers=["fst"])
    cell = "results/smoke/images/purified/cifar10/preactresnet18/fst/stripe@0.05/seed0/shrink@heldout/metrics.json"
    folder.finish("--", cell)
    record = json.loads((folder.path / cell).read_text())
    assert record["status"] == "ok" and (record["attack"], record["defence"]) == ("stripe", "shrink")
    folder.edit("workflow/papers/fst/experiment.yaml", "defences: [ft, fst]}", "defences: [ft, shrink]}")
    assert jobs(folder.run("-n")[1])["purify"] == 2
    folder.edit("my_methods.py", "epochs=5, lr=0.01", "epochs=5, rate=0.01")
    folder.edit("workflow/papers/fst/experiment.yaml", "defences:\n  ft:\n",
                "defences:\n  shrink: {source: own, settings: {lr: 0.1}}\n  ft:\n")
    code, output = folder.run("-n")
    assert code != 0 and "unknown setting of shrink 'lr'" in output


def test_killed_run_ends_with_identical_metrics(finished, tmp_path):
    folder = Folder(tmp_path / "killed", finished.data)
    wanted = {path: record for path, record in finished.metrics().items() if "slow" not in path}
    target = [path for path in wanted if "purified" in path]
    for seconds in (3, 7, 9):
        process = folder.start("--", *target)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    folder.finish("--", *target)
    assert folder.metrics() == wanted


def locked(path: Path) -> bool:
    """Whether another process holds the lock on a file."""
    if not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_two_runs_at_once_are_refused(finished, tmp_path):
    folder = Folder(tmp_path / "twice", finished.data)
    first = folder.start("--", "results/smoke/cells.parquet")
    while not locked(folder.path / "results" / ".cupel.lock"):
        assert first.poll() is None
        time.sleep(0.1)
    code, output = folder.run("--", "results/smoke/cells.parquet")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert code != 0 and "Another run is active" in output


def test_a_failed_cell_does_not_stop_the_report(finished, tmp_path):
    folder = Folder(tmp_path / "failed", finished.data)
    of_fst = "{{alpha: 0.2, lr: {}, epochs: 10, batch_size: 128, momentum: 0.9, projected: true, heads"
    folder.edit("workflow/papers/fst/experiment.yaml", of_fst.format("0.01"), of_fst.format("1.0e+30"))
    folder.finish()
    cells = pd.read_parquet(folder.path / "results/smoke/cells.parquet")
    failed = cells[cells.status == "failed"]
    assert set(failed.defence) == {"fst"} and failed.reason.str.contains("Diverged").all()
    page = (folder.path / "results/smoke/index.html").read_text()
    table = (folder.path / "results/smoke/papers/fst/tables/acc_asr_cifar10_preactresnet18_fst_heldout.md").read_text()
    assert "Diverged" in page and "failed" in table


@pytest.mark.parametrize("file, old, new, texts", [
    ("config.yaml", "scale: smoke", "scale: smok",
     ["config.yaml: scale: 'smok' is not allowed", "smoke, demo, desk, bench, paper"]),
    ("workflow/papers/fst/experiment.yaml", "defences: [ft, fst]}", "defences: [ft, fts]}", ["unknown defence 'fts'", "fst"]),
    ("workflow/papers/fst/claims.yaml", "statement:", "statment:", ["claims.yaml: claims.0: unknown key 'statment'"]),
    ("config.yaml", "scale: smoke", "scale: smoke\nresults: o{u}t",
     ["config.yaml: results: 'o{u}t' is not a path without { and }"]),
    ("config.yaml", "  folder: ", "  folder: https://lab", ["config.yaml: data.folder: https://lab", "is an address"]),
], ids=["config", "experiment", "claims", "path", "address"])
def test_wrong_settings_are_refused_before_any_job(tmp_path, file, old, new, texts):
    folder = Folder(tmp_path / "wrong", tmp_path / "data")
    folder.edit(file, old, new)
    code, output = folder.run()
    assert code != 0 and "nothing was run" in output and "Traceback" not in output
    for text in texts:
        assert text in output, output[-2000:]
    assert not (folder.path / "results").exists()


def test_folders_are_what_people_mean(tmp_path):
    """A slash at the end is none in a path, and ~ is the home folder."""
    folder = Folder(tmp_path / "clone", tmp_path / "data")
    folder.set(papers=["fst"], results="out/", data={"folder": "~/data/"})
    folder.finish("-n", "--", "out/smoke/index.html", str(Path.home() / "data/images/cifar10/manifest.json"))
    folder.set(results="config.yaml")
    code, output = folder.run("-n")
    assert code and "config.yaml: results: config.yaml is a file" in output


def test_released_networks_count_by_content(tmp_path, mnist):
    folder = Folder(tmp_path / "clone", mnist.parents[1].resolve())
    file = tmp_path / "net works" / "mnist_smallgap_int_100.pkl"
    file.parent.mkdir()
    file.write_text("no network")
    folder.set(papers=["proper_interpretability"], released_weights=str(file.parent))
    record = "results/smoke/robust/released_weights/int.json"
    folder.finish("--", record)
    assert "is no pickle" in json.loads((folder.path / record).read_text())["reason"]
    os.utime(file)
    assert "Nothing to be done" in folder.run("-n", "--", record)[1]
    file.write_text("another")
    os.utime(file, (0, 0))
    assert "attack_released" in jobs(folder.run("-n", "--", record)[1])


def test_ims_on_a_clean_victim_can_be_looked_into_by_its_path(tmp_path):
    folder = Folder(tmp_path / "clone", tmp_path / "data")
    folder.set(papers=["ims"])
    place = "results/smoke/images/purified/cifar10/preactresnet18/fst/clean@0/seed0/ims@heldout/masks.svg"
    assert "inside" in folder.finish("-n", "--", place)


def test_all_defences_of_a_victim_in_one_job(finished, tmp_path):
    """`jobs: victim`: the same numbers as cell by cell, and each cell knows its own cost."""
    together = Folder(tmp_path / "together", finished.data)
    together.set(papers=["fst"], jobs="victim")
    metrics = [path for path in finished.metrics() if "purified" in path and "badnets" in path and "slow" not in path]
    planned = jobs(together.run("-n", "--", *metrics)[1])
    assert "purify" not in planned and planned["purify_fst_cifar10_preactresnet18_fst_badnets_0_05_0"] == 1
    together.finish("--", *metrics)
    found, before = together.metrics(), finished.metrics()
    assert found == {path: before[path] for path in found} and len(metrics) == 2
    # one cell is made again: the other is taken over
    first, second = (together.path / Path(path).parent for path in metrics)
    shutil.rmtree(first)
    times = {path.name: path.stat().st_mtime_ns for path in (second / "work").glob("*.json") if path.name != "metrics.json"}
    together.finish("--", metrics[0])
    assert together.metrics() == found
    assert all((second / "work" / name).stat().st_mtime_ns == time for name, time in times.items()) and "made.json" in times
    # a cell outside of the grid is still made by its path
    assert jobs(together.run("-n", "--", metrics[0].replace("fst@", "lp@").replace("ft@", "lp@"))[1])["purify"] == 1
