"""What the experiment files ask for, and the stages' handling of what cannot be done."""

import json
import os
import shutil

import numpy as np
import pytest

from cupel.files import publish
from cupel.grid import LIBRARY, PAPERS, SCHEMAS, ConfigError, Grid, code_digest, read_yaml, typed
from cupel.images import stages
from cupel.reporting import tables


def test_every_paper_plans_at_every_scale():
    for scale in ("smoke", "demo", "bench", "paper"):
        for paper in ("fst", "ims", "zoo"):
            assert Grid([paper], scale).cells()


def test_ims_has_its_288_victims():
    cells = Grid(["ims"], "paper").cells("victim")
    assert len(cells) == 288
    assert len({(c["dataset"], c["model"], c["attack"].partition("~")[0], c["rate"]) for c in cells}) == 288
    assert all(c["attack"] == "sig~dirty" for c in cells if c["attack"].startswith("sig") and c["dataset"] != "cifar10")


def test_papers_share_victims_by_recipe():
    both = Grid(["fst", "ims"], "demo").cells("victim")
    alone = [len(Grid([paper], "demo").cells("victim")) for paper in ("fst", "ims")]
    assert len(both) == max(alone) < sum(alone)


def test_overlays():
    grid = Grid(["fst"], "bench")
    assert grid.defence("fst", "cifar10")["hyperparameters"]["alpha"] == 0.2
    assert grid.defence("fst", "gtsrb")["hyperparameters"] == {
        **grid.defence("fst", "cifar10")["hyperparameters"],
        "epochs": 15,
        "alpha": 0.1,
    }
    assert Grid(["fst"], "demo").defence("ft", "cifar10")["hyperparameters"]["lr"] == 0.03
    assert grid.recipe("fst", "gtsrb")["training"]["epochs"] == 50 and grid.recipe("fst", "gtsrb")["training"]["t_max"] == 100
    assert grid.recipe("fst", "tiny_imagenet")["held_out"] == 0.05


def test_training_changes_of_an_attack():
    assert Grid(["ims"], "paper").attack_training("wanet") == {"drop_last": False, "schedule": "constant"}
    assert Grid(["ims"], "paper").attack_training("inputaware")["epochs"] == 75
    assert "epochs" not in Grid(["zoo"], "demo").attack_training("inputaware")


def test_one_name_one_meaning(tmp_path):
    for name, alpha in (("one", 0.2), ("two", 0.3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.yaml").write_text(
            f"paper: {name}\ntitle: t\nscales: {{}}\ndefences:\n  fst: {{source: x, hyperparameters: {{alpha: {alpha}}}}}\n"
        )
    with pytest.raises(ConfigError, match=r"two/experiment.yaml: defences.fst is defined otherwise in .*one"):
        Grid(["one"], "demo", folder=tmp_path)


def test_every_hyperparameter_has_a_source():
    for paper in ("fst", "ims", "zoo"):
        content = read_yaml(PAPERS / paper / "experiment.yaml")
        for section in ("recipes", "attacks", "defences", "budgets"):
            for name, entry in (content.get(section) or {}).items():
                assert entry["source"].strip(), f"{paper}: {section}.{name}"


def test_command_line_strings_become_what_the_schema_asks_for():
    schema = read_yaml(SCHEMAS / "config.schema.yaml")
    found = typed({"seeds": ["0", "2"], "report": {"allow_missing": "true"}, "scale": "demo", "data": {"mirror": "/1"}}, schema)
    assert found == {"seeds": [0, 2], "report": {"allow_missing": True}, "scale": "demo", "data": {"mirror": "/1"}}
    assert typed({"seeds": ["x"]}, schema) == {"seeds": ["x"]}


def test_code_digest_follows_imports():
    fst, tuning = LIBRARY / "images" / "defences" / "fst.py", LIBRARY / "images" / "defences" / "tuning.py"
    assert code_digest(fst) != code_digest(tuning) and len(code_digest(fst)) == 16
    assert code_digest(fst) == code_digest(fst, tuning)  # fst imports tuning


def test_impossible_rate_becomes_a_failed_victim(tmp_path, cifar10):
    spec = {
        "dataset": "cifar10",
        "model": "preactresnet18",
        "recipe": "r",
        "poison_rate": 0.5,
        "seed": 0,
        "attack": {"name": "sig", "function": "sig", "parameters": {}},
        "settings": {
            "train_size": 500,
            "test_size": 100,
            "model": {"width": 8, "stem_stride": 2},
            "training": {"epochs": 1, "lr": 0.1, "batch_size": 50},
        },
    }
    data = str(cifar10.parent)
    inputs = stages.Inputs(data=data, record=tmp_path / "poison.npz")
    stages.poison(spec, data, None, inputs.record)
    outputs = {
        key: str(tmp_path / name)
        for key, name in (
            ("model", "model.safetensors"),
            ("trigger", "trigger.npz"),
            ("history", "history.csv"),
            ("metrics", "metrics.json"),
        )
    }
    stages.train_victim(spec, inputs, outputs, "cpu")
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["status"] == "failed" and "the largest possible rate is 0.1" in record["reason"]
    from cupel.images import models

    with pytest.raises(models.NotACheckpoint):
        models.load(outputs["model"])


def test_budgets(cifar10):
    from cupel.images import datasets

    train = datasets.load(cifar10, "train")
    spec = {"recipe": "r", "seed": 0, "settings": {"held_out": 0.02, "train_size": 2000}}
    held = stages.clean_budget(train, spec, {"name": "heldout", "kind": "held_out"})
    seen = stages.training_split(train, spec["settings"], 0).train
    assert len(held) == 1000 and not set(held) & set(seen)
    drawn = stages.clean_budget(train, spec, {"name": "spc10", "kind": "spc", "spc": 10, "pool": "train"})
    assert len(drawn) == 100 and set(drawn) <= set(seen)
    apart = stages.clean_budget(train, spec, {"name": "spc10", "kind": "spc", "spc": 10, "pool": "held_out"})
    assert set(apart) <= set(held)
    with pytest.raises(ValueError, match="recipe r holds out none"):
        stages.clean_budget(train, {**spec, "settings": {}}, {"name": "heldout", "kind": "held_out"})


def test_missing_cells_are_shown_as_failed(tmp_path):
    cell = {
        "paper": "fst",
        "stage": "purified",
        "dataset": "d",
        "model": "m",
        "recipe": "r",
        "attack": "a~v",
        "rate": "0.01",
        "seed": "3",
        "defence": "fst~x",
        "budget": "b",
        "folder": str(tmp_path),
    }
    table = tables.gather([cell])
    assert set(table.status) == {"failed"} and set(table.variant) == {"x"} and set(table.attack_variant) == {"v"}
    named = tables.with_names(table, {"fst~x": "FST x"})
    grid = tables.wide(tables.summary(named), ["FST x"])
    assert grid.iloc[0].tolist() == ["failed", "failed"]
    assert np.isnan(table.value).all()


def test_blocks_hold_every_purified_cell_once():
    grid = Grid(["fst", "ims", "ims_inner_step"], "demo")
    blocks = grid.blocks()
    cells = [tuple(sorted((k, v) for k, v in cell.items() if k != "paper")) for block in blocks.values() for cell in block]
    assert len(cells) == len(set(cells)) == len(grid.cells("purified"))
    assert all(len({cell["attack"] + cell["rate"] for cell in block}) == 1 for block in blocks.values())
    # what is asked for first is not moved by what is asked for besides
    alone = Grid(["fst"], "demo").blocks()
    assert {key: block for key, block in blocks.items() if key[0] == "fst"} == alone


def test_the_paper_scale_has_one_purifying_job_for_each_victim():
    """Snakemake takes 6 ms to plan a job: as many jobs as cells would take two minutes before anything runs."""
    grid = Grid(["fst", "ims"], "paper")
    blocks = grid.blocks()
    assert len(blocks) == 288 + 30
    assert sum(map(len, blocks.values())) == len(grid.cells("purified")) == 18330


def test_only_a_leak_sees_a_number_of_the_test_set():
    past = {"acc": 0.75, "asr": 1.0}
    assert stages._leaks({"hyperparameters": {"lr": 0.1, "reference_accuracy": "victim:acc"}}, past) == {
        "lr": 0.1, "reference_accuracy": 0.75}
    entries = Grid([], "demo").entries["defences"]
    leaking = {name for name, entry in entries.items() if "victim:" in str(entry)}
    assert leaking == {"anp~leak", "anp~released"}


def test_a_family_without_a_form_is_refused(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "experiment.yaml").write_text("paper: odd\nfamily: audio\ntitle: Odd\nscales: {}\n")
    with pytest.raises(ConfigError, match=r"family: unknown family 'audio': known are image"):
        Grid(["odd"], "demo", folder=tmp_path)


def test_a_killed_block_goes_on(tmp_path, monkeypatch):
    """Finished cells of a killed job are taken over, and only those whose settings, code and inputs are the same."""
    def purify(spec, defence, inputs, outputs, device):
        with open(tmp_path / "calls", "a") as file:
            file.write(defence["name"])
        if (tmp_path / "killed").exists() and defence["name"] == "b":
            raise MemoryError
        for path in outputs.values():
            path.write_text(defence["name"])

    def run(codes="xyz"):
        (tmp_path / "calls").write_text("")
        work = [stages.Job({"name": name}, code, paths) for name, code, paths in zip("abc", codes, outputs, strict=True)]
        stages.purify_block({"dataset": "d"}, work, stages.Inputs(str(tmp_path), trigger=victim, victim=victim, before=victim),
                            "cpu")

    monkeypatch.setattr(stages, "purify", purify)
    (tmp_path / "d").mkdir()
    victim = tmp_path / "d" / "manifest.json"
    victim.write_text("{}")
    outputs = [{"model": str(tmp_path / name / "model"), "metrics": str(tmp_path / name / "metrics.json")} for name in "abc"]
    (tmp_path / "killed").touch()
    with pytest.raises(RuntimeError):
        run()
    assert (tmp_path / "calls").read_text() == "ab" and not (tmp_path / "a" / "metrics.json").exists()
    with pytest.raises(RuntimeError):
        run("Xyz")  # the code of the first has changed
    assert (tmp_path / "calls").read_text() == "ab"
    (tmp_path / "killed").unlink()
    run("Xyz")
    assert (tmp_path / "calls").read_text() == "bc"
    assert all((tmp_path / name / "metrics.json").read_text() == name for name in "abc")
    for paths in outputs:  # as Snakemake does before a job runs again
        for path in paths.values():
            os.unlink(path)
    run("Xyz")
    assert (tmp_path / "calls").read_text() == ""
    first = tmp_path / "a" / "metrics.json"
    assert first.read_text() == "a" and first.samefile(tmp_path / "a" / "work" / "metrics.json"), "no second copy"
    first.write_text("cut")
    (tmp_path / "b" / "work" / "made.json").write_text("{cut")
    shutil.rmtree(tmp_path / "c")
    run("Xyz")  # one is damaged, of one the note is, one was removed
    assert (tmp_path / "calls").read_text() == "abc" and first.read_text() == "a"


def test_results_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "made").write_text("new")
    (tmp_path / "result").write_text("old")
    publish(tmp_path / "made", tmp_path / "result")
    assert (tmp_path / "result").read_text() == "new" and not (tmp_path / "made").exists()


def test_jobs_of_a_victim_or_of_a_cell():
    assert Grid(["fst"], "demo").blocks() and not Grid(["fst"], "demo", jobs="cell").blocks()
    cells = Grid(["fst"], "smoke", jobs="victim")
    assert sum(map(len, cells.blocks().values())) == len(cells.cells("purified"))
