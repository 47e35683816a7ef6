"""The stages of the image family: what cannot be done, clean budgets, blocks of defences."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.experiment import Grid
from cupel.files import digest, publish, write_json
from cupel.images import stages


def test_impossible_rate_becomes_a_failed_victim(tmp_path, cifar10):
    spec = {
        "dataset": "cifar10",
        "model": "preactresnet18",
        "recipe": "r",
        "poison_rate": 0.5,
        "seed": 0,
        "attack": {"name": "sig", "function": "sig", "settings": {}},
        "settings": {
            "train_size": 500,
            "test_size": 100,
            "model": {"width": 8, "stem_stride": 2},
            "training": {"epochs": 1, "lr": 0.1, "batch_size": 50},
        },
    }
    data = str(cifar10.parent)
    stages.poison(spec, data, None, tmp_path / "poison.npz")
    outputs = {
        key: str(tmp_path / name)
        for key, name in (
            ("model", "model.safetensors"),
            ("trigger", "trigger.npz"),
            ("history", "history.csv"),
            ("metrics", "metrics.json"),
        )
    }
    stages.train_victim(spec, stages.Inputs(data, record=tmp_path / "poison.npz"), outputs, "cpu")
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["status"] == "failed" and "the largest possible rate is 0.1" in record["reason"]
    from cupel.images import models

    with pytest.raises(models.NotACheckpoint):
        models.load(outputs["model"])


def test_a_defence_of_a_victim_without_a_backdoor(tmp_path, cifar10):
    """There is nothing to remove: accuracy and its loss are all that is measured, and what compares ASR is absent."""
    spec = {"dataset": "cifar10", "model": "preactresnet18", "recipe": "r", "poison_rate": 0.0, "seed": 0,
            "attack": {"name": "clean", "function": "none", "settings": {}},
            "settings": {"train_size": 200, "test_size": 100, "held_out": 0.001, "model": {"width": 8, "stem_stride": 2},
                         "training": {"epochs": 1, "lr": 0.1, "batch_size": 50}}}
    data, names = str(cifar10.parent), ("model.safetensors", "trigger.npz", "history.csv", "metrics.json", "details.npz")
    outputs = {name.partition(".")[0]: str(tmp_path / name) for name in names}
    stages.poison(spec, data, None, tmp_path / "poison.npz")
    stages.train_victim(spec, stages.Inputs(data, record=tmp_path / "poison.npz"), outputs, "cpu")
    inputs = stages.Inputs(data, victim=outputs["model"], trigger=outputs["trigger"], before=outputs["metrics"])
    defence = {"name": "ft", "function": "ft", "settings": {"epochs": 1}, "budget": {"name": "h", "kind": "held_out"}}
    after = {name: str(tmp_path / "after" / Path(path).name) for name, path in outputs.items() if name != "trigger"}
    (tmp_path / "after").mkdir()
    stages.purify(spec, defence, inputs, after, "cpu")
    before, record = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, tmp_path / "after"))
    assert record["status"] == "ok" and record["acc_before"] == before["acc"]
    assert record["arr"] == 1 - record["acc"] / before["acc"] and record["arr_low"] < record["arr"] < record["arr_high"]
    assert not {"asr", "ra", "der", "rdr", "asr_before", "ra_before"} & record.keys()
    taken = np.array(record["confusion"].pop("clean"))
    assert taken.shape == (10, 10) and taken.sum() == 100 and np.trace(taken) == round(100 * record["acc"])
    assert not record["confusion"]


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


def test_only_a_leak_sees_a_number_of_the_test_set():
    past = {"acc": 0.75, "asr": 1.0}
    assert stages._leaks({"settings": {"lr": 0.1, "reference_accuracy": "victim:acc"}}, past) == {
        "lr": 0.1, "reference_accuracy": 0.75}
    entries = Grid([], "demo").families["images"].entries["defences"]
    leaking = {name for name, entry in entries.items() if "victim:" in str(entry)}
    assert leaking == {"anp~leak", "anp~released"}


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
        jobs = [stages.Job({"name": name}, code, paths) for name, code, paths in zip("abc", codes, outputs, strict=True)]
        stages.purify_block({"dataset": "d"}, jobs, stages.Inputs(str(tmp_path), trigger=victim, victim=victim, before=victim),
                            "cpu")

    monkeypatch.setattr(stages, "purify", purify)
    (tmp_path / "d").mkdir()
    victim = tmp_path / "d" / "manifest.json"
    victim.write_text("{}")
    outputs = [{"model": str(tmp_path / name / "model"), "metrics": str(tmp_path / name / "metrics.json")} for name in "abc"]
    (tmp_path / "killed").touch()
    with pytest.raises(RuntimeError):
        run()
    assert (tmp_path / "calls").read_text() == "abc", "what fails does not keep the others from being made"
    assert not (tmp_path / "a" / "metrics.json").exists()
    with pytest.raises(RuntimeError):
        run("Xyz")  # the code of the first has changed
    assert (tmp_path / "calls").read_text() == "ab"
    (tmp_path / "killed").unlink()
    run("Xyz")
    assert (tmp_path / "calls").read_text() == "b"
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


def test_what_a_defence_leaves_on_its_way_is_measured(tmp_path, cifar10, monkeypatch):
    from cupel.images import defences, models
    from cupel.reporting.tables import gather

    def bent(victim, budget, rng):
        """Sees class 0 everywhere, and class 3 half way."""
        network, bias = copy.deepcopy(victim), torch.zeros(10)
        bias[3] = 1e6
        budget.snapshot("halfway", {"head.bias": bias})
        network.head.bias.data = bias.roll(-3)
        return network, []

    monkeypatch.setitem(defences.DEFENCES, "bent", bent)
    victim = models.build("preactresnet18", num_classes=10, width=8, stem_stride=2, seed=0)
    models.save(victim, tmp_path / "victim.safetensors")
    before = {key: value for name in ("acc", "asr", "ra") for key, value in ((name, 0.5), (f"{name}_n", 100))}
    write_json(tmp_path / "victim.json", {"status": "ok", "rate_reached": 0.1, **before,
                                         "model_sha256": digest(tmp_path / "victim.safetensors")})
    spec = {"dataset": "cifar10", "model": "preactresnet18", "recipe": "r", "poison_rate": 0.1, "seed": 0,
            "attack": {"name": "blended", "function": "blended", "settings": {"alpha": 0.2}},
            "settings": {"train_size": 500, "test_size": 100, "training": {}}}
    defence = {"name": "bent", "function": "bent", "settings": {}, "budget": {"name": "spc2", "kind": "spc", "spc": 2}}
    inputs = stages.Inputs(str(cifar10.parent), victim=tmp_path / "victim.safetensors", before=tmp_path / "victim.json")
    files = {name: tmp_path / file for name, file in (
        ("model", "model.safetensors"), ("history", "history.csv"), ("metrics", "metrics.json"))}
    stages.purify(spec, defence, inputs, files, "cpu")
    table = gather([{"paper": "p", "folder": str(tmp_path)}]).set_index("metric")
    assert list(table.index) == ["acc", "asr", "ra", "der", "arr", "rdr", "acc_halfway", "asr_halfway", "ra_halfway",
                                 "redirected"]
    assert table.value["asr"] == 1 and table.value["asr_halfway"] == 0 and table.value["ra"] == 0
    assert 0 < table.value["ra_halfway"] < 0.5 and table.low["ra_halfway"] > 0
    assert json.loads(table.attack_parameters["asr"]) == {"function": "blended", "settings": {"alpha": 0.2}}
    assert json.loads(table.defence_parameters["asr"]) == {"function": "bent", "settings": {}}
    assert table.n["asr_halfway"] == table.n["asr"] and table.n["acc_halfway"] == 100
    taken = np.array(json.loads(files["metrics"].read_text())["confusion"]["triggered"])
    assert (taken[1:, 0] == taken[1:].sum(1)).all() and taken[0].sum() == 0 and taken.sum() == table.n["asr"]
