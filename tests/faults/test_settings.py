"""Wrong configurations: each is refused before the first job, and the text names file, key and what is allowed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.faults.record import shorten, trial
from tests.faults.runs import error_lines
from tests.test_workflow import Folder

EXPERIMENT, CLAIMS = "workflow/papers/fst/experiment.yaml", "workflow/papers/fst/claims.yaml"
SMOKE = "scales.smoke.blocks.0"

# what is set in config.yaml -> what the text must hold
CONFIG = [
    ({"scale": "dem"}, ["config.yaml: scale: 'dem'", "smoke, demo, desk, bench, paper"]),
    ({"scale": ["smoke"]}, ["config.yaml: scale:", "smoke, demo, desk, bench, paper"]),
    ({"scael": "demo"}, ["config.yaml: unknown key 'scael'", "known are", "did you mean 'scale'?"]),
    ({"papers": "fst"}, ["config.yaml: papers: 'fst'", "array"]),
    ({"papers": ["fts"]}, ["config.yaml: papers: unknown paper 'fts'", "known are", "did you mean 'fst'?"]),
    ({"papers": ["fst", "fst"]}, ["config.yaml: papers:", "non-unique"]),
    ({"seeds": [1.5]}, ["config.yaml: seeds.0: 1.5", "integer"]),
    ({"seeds": []}, ["config.yaml: seeds:", "non-empty"]),
    ({"device": "gpu"}, ["config.yaml: device: 'gpu'", "auto, cpu, cuda"]),
    ({"data": {"sources": ["web"]}}, ["config.yaml: data.sources.0: 'web'", "official, hub, package, mirror"]),
    ({"data": {"folders": "x"}}, ["config.yaml: data: unknown key 'folders'", "known are", "did you mean 'folder'?"]),
    ({"plugins": ["missing.py"]}, ["config.yaml: plugins: no such file: missing.py"]),
    ({"report": {"allow_missing": "perhaps"}}, ["config.yaml: report.allow_missing: 'perhaps'", "boolean"]),
]
# text replaced in experiment.yaml
EXPERIMENTS = [
    ("attacks: [badnets], rates", "attacks: [badnet], rates",
     [f"{SMOKE}.attacks: unknown attack 'badnet'", "did you mean 'badnets'?"]),
    ("defences: [ft, fst]}", "defences: [ft, fts]}", [f"{SMOKE}.defences: unknown defence 'fts'", "known are", "fst"]),
    ("budgets: [heldout], defences: [ft, fst]}", "budgets: [holdout], defences: [ft, fst]}",
     [f"{SMOKE}.budgets: unknown budget 'holdout'", "heldout"]),
    ("models: [preactresnet18], recipe: fst", "models: [preactresnet18], recipe: fts",
     [f"{SMOKE}.recipe: unknown recipe 'fts'", "fst"]),
    ("datasets: [cifar10], models: [preactresnet18]", "datasets: [cifar11], models: [preactresnet18]",
     ["experiment.yaml", "datasets: unknown dataset 'cifar11'", "cifar10"]),
    ("rates: [0.05],", "rates: [1.5],", [f"{SMOKE}.rates.0: 1.5", "below 1"]),
    ("heads: last}\n    datasets", "headz: last}\n    datasets",
     ["defences.fst.settings: unknown setting of fst 'headz'", "known are"]),
    ("schedule: cosine, t_max: 100", "schedule: cosin, t_max: 100",
     ["recipes.fst.settings.training.schedule: 'cosin'", "constant, cosine, multistep, plateau, onecycle"]),
    ("hold_out_order: first", "hold_out_order: last", ["recipes.fst.settings.hold_out_order: 'last'", "first, random"]),
    ("held_out: 0.02", "held_out: 1.0", ["recipes.fst.settings.held_out: 1.0", "below 1"]),
    ("epochs: 1, crop: 0, t_max: null, batch_size: 50}", "epochs: 0, crop: 0}",
     ["recipes.fst.scales.smoke.training.epochs: 0", "at least 1"]),
    ("\n    seeds: [0]\n    blocks:\n      - {datasets", "\n    jobs: victims\n    seeds: [0]\n    blocks:\n      - {datasets",
     ["scales.smoke.jobs: 'victims'", "cell, victim"]),
    ("scales:\n  smoke:\n    note", "scales:\n  smok:\n    note",
     ["scales: unknown key 'smok'", "bench, demo, desk, paper, smoke"]),
    ("    function: ft\n", "    function: fttt\n", ["defences.ft~projected.function: unknown defence 'fttt'", "known are"]),
    ("paper: fst\n", "paper: [fst\n", ["experiment.yaml", "not valid YAML"]),
]
# text replaced in claims.yaml
CLAIM = [
    ("id: fst-purifies", "idd: fst-purifies", ["unknown key 'idd'", "did you mean 'id'?"]),
    ("scales: [bench, paper]", "scales: [bench, huge]", ["claims.2.scales.1: 'huge'", "smoke, demo, desk, bench, paper"]),
    ("direction: less", "direction: fewer", ["claims.5.test.direction: 'fewer'", "greater, less"]),
    ("margin: 0.1}", "margin: some}", ["claims.4.test.margin: 'some'", "number"]),
    ("min_n: 3", "min_n: 0", ["min_n: 0", "at least 1"]),
    ("claims:\n", "claims: [\n", ["claims.yaml", "not valid YAML"]),
]
# arguments
COMMAND = [
    (["--config", "scale=dem"], ["scale: 'dem'", "smoke, demo, desk, bench, paper"]),
    (["--config", "scael=demo"], ["unknown key 'scael'", "did you mean 'scale'?"]),
    (["--config", "seeds=[-1]"], ["seeds.0: -1", "at least 0"]),
    (["--config", "papers=[fst,imz]"], ["papers: unknown paper 'imz'", "known are"]),
    (["--config", "device=gpu"], ["device: 'gpu'", "auto, cpu, cuda"]),
    (["--config", "data={sources: [web]}"], ["data.sources.0: 'web'", "official, hub, package, mirror"]),
    (["--", "results/smoke/images/purified/cifar10/preactresnet18/fst/badnets@0.05/seed0/fts@heldout/metrics.json"],
     ["unknown defence 'fts'", "known are", "experiment.yaml"]),
]
CASES = [*(("config.yaml", change, texts) for change, texts in CONFIG),
         *(("experiment.yaml", (old, new), texts) for old, new, texts in EXPERIMENTS),
         *(("claims.yaml", (old, new), texts) for old, new, texts in CLAIM),
         *(("command line", arguments, texts) for arguments, texts in COMMAND)]


def refuse(folder, place, change):
    """Run with one thing wrong, then put it right again."""
    file = {"experiment.yaml": EXPERIMENT, "claims.yaml": CLAIMS}.get(place, "config.yaml")
    before = (folder.path / file).read_text()
    try:
        if place == "config.yaml":
            content = yaml.safe_load(before)
            content.update(change)
            (folder.path / file).write_text(yaml.safe_dump(content))
        elif place != "command line":
            folder.edit(file, *change)
        return folder.run(*(change if place == "command line" else ()))
    finally:
        (folder.path / file).write_text(before)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All cases, two at a time; each (exit code, output, what stands in the folder afterwards)."""
    top = tmp_path_factory.mktemp("wrong")

    def lane(number):
        folder = Folder(top / str(number), top / "nowhere")
        found = {}
        for k in range(number, len(CASES), 2):
            code, output = refuse(folder, *CASES[k][:2])
            found[k] = code, output, [name for name in ("results", "logs", "data") if (folder.path / name).exists()]
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lane, range(2))
    return {**first, **second, "data": (top / "nowhere").exists()}


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda k: f"{CASES[k][0]}-{str(CASES[k][1])[:40]}")
def test_wrong(outcomes, number):
    place, change, texts = CASES[number]
    code, output, made = outcomes[number]
    with trial("setting", place, str(change)[:100]) as row:
        row.message = shorten(error_lines(output, texts[0]) or output[-200:], 160)
        assert code != 0 and not made and not outcomes["data"], f"exit code {code}, made: {made}"
        assert "localrule" not in output and "\nrule " not in output, "a job was started"
        missing = [text for text in texts if text not in output]
        assert not missing, f"not in the text: {missing}\n{output[-1500:]}"
        if place in ("config.yaml", "experiment.yaml"):
            assert "nothing was run" in output and "Traceback" not in output
        row.happened = "refused before the first job"
