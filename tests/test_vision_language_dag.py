"""BYE in the DAG: what experiment.yaml may say, cells, filters as files, tables and figures, and the chain end to end."""

import copy
import dataclasses
import inspect
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from cupel.experiment import SCALES, Grid
from cupel.files import digest, read_json, write_json
from cupel.registry import load_plugins
from cupel.reporting import tables
from cupel.settings import PAPERS, ConfigError, check_schema, read_yaml, schema
from cupel.vision_language import detection, filters, purification, stages, triggers
from cupel.vision_language.datasets import load, shapes, tiles
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.poison import poison, truth
from tests.conftest import REPOSITORY, planned
from tests.test_workflow import Folder, jobs

FILE = PAPERS / "bye" / "experiment.yaml"
CONTENT = read_yaml(FILE)


def experiment() -> dict:
    return copy.deepcopy(CONTENT)


def plan(scale="smoke", content=None, **settings):
    return planned(content or experiment(), scale, **settings)


def cell(dataset, model, recipe, attack, rate, seed):
    return {"dataset": dataset, "model": model, "recipe": recipe, "attack": attack, "rate": rate, "seed": seed}


# --------------------------------------------------------------------------------------------------------------------- grid


def test_every_scale_plans_and_every_entry_has_a_source():
    assert Grid(["bye"], "demo").experiments["bye"]["family"] == "vision_language"
    for scale in set(SCALES) & set(read_yaml(FILE)["scales"]):
        cells = plan(scale).cells
        assert {"victim", "filtered", "purified"} == {cell["stage"] for cell in cells}
        assert all(isinstance(value, str) for cell in cells for value in cell.values())
        assert len({tuple(sorted(cell.items())) for cell in cells}) == len(cells)
    content = experiment()
    for section in ("datasets", "models", "recipes", "attacks", "defences"):
        assert all(entry["source"].strip() for entry in content[section].values())


def test_paper_scale_has_the_grid_of_the_paper():
    cells = plan("paper", seeds=[0]).cells
    main = {(c["dataset"], c["model"]) for c in cells
            if c["stage"] == "victim" and c["attack"] == "square" and c["rate"] == "0.1" and c["recipe"].endswith("_lora")}
    datasets, models = ("scienceqa", "iconqa", "flickr30k", "rsvqa"), ("llava_1_5_7b", "internvl2_5_2b_mpo")
    assert main == {(dataset, model) for dataset in datasets for model in models}
    refits = {c["defence"] for c in cells if c["stage"] == "purified" and c["dataset"] == "scienceqa"}
    assert {"bye", "bye~continued", "random_drop", "oracle", "oracle~r90"} <= refits
    assert {c["rate"] for c in cells if c["dataset"] == "scienceqa"} == {"0", "0.01", "0.05", "0.1", "0.2"}


def test_schema_knows_the_settings_of_training_and_of_models():
    from cupel.vision_language import models
    from cupel.vision_language.training import TrainingSettings

    form = schema("vision_language")
    fields = {field.name for field in dataclasses.fields(TrainingSettings)}
    assert set(form["$defs"]["training"]["properties"]) == fields | {"questions"}
    entry = form["sections"]["models"]["properties"]
    arguments = {name for function in (models.tiny_llava, models.smollm2_llava)
                 for name, value in inspect.signature(function).parameters.items() if value.kind is value.KEYWORD_ONLY}
    assert set(entry["settings"]["properties"]) == arguments - {"seed"}
    recipe = experiment()["recipes"]["llava_lora"]["settings"]["training"]
    settings, questions = stages.settings_of(recipe, "cpu")
    assert questions == 1 and (settings.epochs, settings.lr, settings.rank, settings.lora_alpha) == (3, 2e-4, 32, 64)


@pytest.mark.parametrize(("place", "value", "message"), [
    ("datasets.easy_vqa.dataset", "easyvqa", "unknown dataset 'easyvqa'.*did you mean 'easy_vqa'"),
    ("datasets.easy_vqa.train", 40000, r"train and pretrain ask for 64000 samples, but split train has 38575"),
    ("datasets.easy_vqa.excerpt", True, "no excerpt of easy_vqa is known; set it to false"),
    ("datasets.shapes_tiny", {"dataset": "shapes", "test": 4, "target": "x", "source": "x"}, "say how many samples with train"),
    ("datasets.shapes_tiny.asks", ["what"], "shapes is made by the pipeline, questions and all"),
    ("models.micro_llava.hub", "a/b", "exactly one of built, hub and folder"),
    ("models.micro_llava.language_model", "smollm2-135m", "belongs to built: smollm2_llava"),
    ("models.smol_llava.settings", {"width": 3}, "unknown parameter of smollm2_llava 'width'"),
    ("models.micro_llava.settings.patch_size", 7, "32 is no multiple of patch_size 7"),
    ("models.micro_llava.pretraining.trained", "lora", "pretraining trains all weights"),
    ("models.llava_1_5_7b.settings", {}, "belongs to models that are built here"),
    ("attacks.square.function", "circle", "unknown attack 'circle'"),
    ("attacks.square.settings", {"size": 3}, "unknown setting of square 'size'"),
    ("defences.bye.settings.tua", 2.0, "unknown setting of bye 'tua'.*did you mean 'tau'"),
    ("defences.bye.settings.rule", "root", "'root' is not allowed; allowed are rss"),
    ("defences.oracle.settings.recall", 90, "90 is out of range: it must be at most 1"),
    ("defences.fixed_threshold.settings.threshold", "some", r"'some' is not allowed; allowed are number, \['scaled'\]"),
    ("defences.blur.refit_from", "base", "nothing is fitted again"),
    ("defences.blur.function", "zip", "zip needs a diffusion model|unknown setting of zip 'sigma'"),
    ("defences.random_drop.function", "blur", "unknown filter 'blur'"),
    ("scales.smoke.filters", ["bye", "downsample"], "unknown filter 'downsample'"),
    ("scales.smoke.blocks.0.datasets", ["rsvqa"], "give datasets.rsvqa.pretrain"),
    ("scales.smoke.blocks.0.rates", [0.001], "0.001 of 160 samples of shapes_tiny is not one sample"),
    ("scales.demo.blocks.0.defences", ["pooled5"], "pools by 5, which does not divide"),
])
def test_what_can_be_known_to_be_wrong_is_refused(place, value, message):
    content = experiment()
    pooled = {"kind": "pictures", "function": "downsample", "source": "x", "settings": {"scale": 5}}
    content["defences"]["pooled5"] = pooled
    *path, last = place.split(".")
    target = content
    for key in path:
        target = target[int(key)] if isinstance(target, list) else target[key]
    target[last] = value
    with pytest.raises(ConfigError, match=f"experiment.yaml: .*({message})"):
        plan("demo" if "demo" in place else "smoke", content)


def test_a_variant_of_the_refit_uses_the_same_decision():
    found = plan("bench")
    for name, decided, start in (("bye~continued", "bye", "poisoned"), ("bye~rss", "bye~rss", "base")):
        entry = found.defence({"defence": name})
        assert (entry["filter"], entry["refit_from"]) == (decided, start)
    assert "bye~continued" not in found.filters() and "oracle~r90" in found.filters()
    with pytest.raises(ConfigError, match="unknown defence 'by'"):
        found.defence({"defence": "by"})


def test_without_poison_one_trigger_is_enough():
    content = experiment()
    content["scales"]["smoke"]["blocks"][0] |= {"attacks": ["square~quarter", "blend"], "rates": [0, 0.2]}
    found = [(c["attack"], c["rate"]) for c in plan("smoke", content).cells if c["stage"] == "victim"]
    assert found == [("square~quarter", "0"), ("square~quarter", "0.2"), ("blend", "0.2")]


def test_specs_name_what_they_depend_on():
    found = plan("bench").victim(cell("easy_vqa", "smol_llava", "smol_lora", "square", "0.05", "3"))
    assert found["attack"] == {"name": "square", "function": "square", "settings": {}}
    assert (found["poison_rate"], found["seed"], found["target"]) == (0.05, 3, "Backdoor Attack!")
    assert "poison_rate" not in plan().poison({"dataset": "shapes_tiny", "attack": "square", "seed": "0"})


def plugin(folder) -> Path:
    """The worked example of docs/extending.md for this family, as printed there."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "extending.md").read_text(), re.DOTALL)
    path = folder / "my_pictures.py"
    path.write_text(next(block for block in blocks if "@trigger" in block))
    return path


def test_a_plugin_adds_a_trigger_a_filter_and_a_picture_defence(chain, tmp_path):
    content = experiment()
    content["attacks"]["band"] = {"source": "own", "settings": {"height": 2}}
    content["defences"] |= {"lowest": {"source": "own", "kind": "filter", "settings": {"share": 0.2}},
                            "posterise": {"source": "own", "kind": "pictures"}}
    content["scales"]["smoke"]["blocks"][0] |= {"attacks": ["band"], "defences": ["lowest", "posterise"]}
    path = plugin(tmp_path)
    with pytest.raises(ConfigError, match="unknown attack 'band'"):
        plan(content=content)
    found = plan(content=content, plugins=[path])
    assert {cell["attack"] for cell in found.cells} == {"band"} and found.code("defence", "lowest") == f"{path}:lowest"
    assert found.code("filter", "bye").endswith("bye.py:bye")
    content["defences"]["lowest"]["settings"] = {"part": 0.2}
    with pytest.raises(ConfigError, match="unknown setting of lowest 'part'"):
        plan(content=content, plugins=[path])
    load_plugins([path])
    image = np.zeros((32, 32, 3), np.uint8)
    assert triggers.stamp("band", image, 0, "a", height=2).sum() == 2 * 32 * 3 * 255
    filter_all(chain["0.1"], (), {"lowest": {"function": "lowest", "settings": {"share": 0.2}}})
    assert len(read_json(chain["0.1"]["filtered"] / "flags" / "lowest.json")["flagged"]) == 80
    assert len(np.unique(purification.purify("posterise", np.arange(3 * 256, dtype=np.uint8).reshape(1, 16, 16, 3)))) == 9
    del triggers.trigger["band"], filters.sample_filter["lowest"], purification.picture_defence["posterise"]


# --------------------------------------------------------------------------------------------------------------------- data


def test_shapes_are_drawn_by_code(tmp_path):
    entry = experiment()["datasets"]["shapes_tiny"]
    manifest = stages.prepare(entry, tmp_path / "a")
    assert manifest["counts"] == {"pretrain": 240, "train": 160, "test": 60} and manifest["source"]["kind"] == "generated"
    assert shapes.prepare(tmp_path / "b", train=160, test=60, pretrain=240)["content_sha256"] == manifest["content_sha256"]
    splits = {name: load(tmp_path / "a", name) for name in ("pretrain", "train", "test")}
    pictures = [{record["image"] for record in samples.records} for samples in splits.values()]
    assert not pictures[0] & pictures[1] and not pictures[1] & pictures[2]
    for k in range(0, 60, 2):
        image, (colour, form) = splits["test"].image(k).astype(int), [splits["test"][k + j]["answer"] for j in (0, 1)]
        inside = np.abs(image - image[0, 0]).sum(-1) > 0
        assert image[inside][0].argmax() == ["red", "green", "blue"].index(colour)
        box = inside[np.ix_(inside.any(1), inside.any(0))]
        assert box.all() == (form == "square")


def test_tiles_are_drawn_by_code(tmp_path):
    manifest = stages.prepare({"dataset": "tiles", "train": 30, "test": 10, "pretrain": 5}, tmp_path / "a")
    assert manifest["counts"] == {"pretrain": 5, "train": 30, "test": 10} and manifest["pictures"] == 45
    assert tiles.prepare(tmp_path / "b", train=30, test=10, pretrain=5)["content_sha256"] == manifest["content_sha256"]
    samples = load(tmp_path / "a", "train")
    for k in range(30):
        cells = samples.image(k).reshape(9, 8, 9, 8, 3).mean((1, 3))
        coloured = np.ptp(cells, axis=-1) > 20
        assert coloured.sum() == tiles.COLOURED and samples[k]["question"] in tiles.QUESTIONS
        wanted = np.array(tiles.COLOURS[samples[k]["answer"]])
        assert (np.abs(cells[coloured] - wanted).max(-1) <= 0.16 * wanted.max() + 8).all()
    stamped = triggers.stamp("square", samples.image(0), 0, "x", divisor=9).reshape(9, 8, 9, 8, 3)
    assert np.argwhere(stamped.max((1, 3, 4)) == 0).tolist() == [[4, 4]]  # one tile, whole


# ---------------------------------------------------------------------------------------------------------------- detection


def entropies_like(poisoned: np.ndarray, shift: float, layers: int = 3, seed: int = 0) -> np.ndarray:
    """Layer 0 never tells; the others fall by `shift` where a sample is poisoned."""
    draw = np.random.default_rng(seed).normal(3.5, 0.1, (len(poisoned), layers))
    draw[:, 1:] -= shift * poisoned[:, None]
    return draw


def make_chain(tmp_path) -> dict:
    """Folders of two victims on prepared shapes, poisoned at 10 % and not at all, with entropies made up."""
    shapes.prepare(tmp_path / "data" / "shapes_tiny", train=400, test=40, pretrain=20)
    found = plan("smoke")
    made = {}
    for rate, shift in (("0.1", 1.5), ("0", 0.0)):
        folder = tmp_path / f"poisoned@{rate}"
        poison(tmp_path / "data" / "shapes_tiny", folder, function="square", poison_rate=float(rate), seed=0,
               parameters={"divisor": 4})
        filtered = tmp_path / f"filtered@{rate}"
        bad = truth(folder)
        values = entropies_like(bad, shift)
        table = pd.DataFrame(np.hstack([values, values / 5]), columns=[f"{name}_{k}" for name in ("layer", "tsallis")
                                                                      for k in range(3)])
        table.insert(0, "id", [record["id"] for record in load(folder, "train").records])
        filtered.mkdir()
        table.to_parquet(filtered / "entropies.parquet")
        write_json(filtered / "attention.json", {"image_tokens": 64, "layers": 3, "seconds": 1.0, "samples": len(table)})
        spec = found.victim(cell("shapes_tiny", "micro_llava", "micro_lora", "square~quarter", rate, "0"))
        made[rate] = {"poisoned": folder, "filtered": filtered, "spec": spec, "bad": bad}
    return made


@pytest.fixture
def chain(tmp_path):
    return make_chain(tmp_path)


def filter_all(made: dict, taus=(0.0, 2.0, 3.0), asked=None) -> dict:
    asked = asked or plan("smoke").filters()
    folder = made["filtered"]
    flags = {name: folder / "flags" / f"{name}.json" for name in asked}
    outputs = {"flags": flags, "record": folder / "filters.json", "metrics": folder / "metrics.json"}
    inputs = Inputs(entropies=folder / "entropies.parquet", attention=folder / "attention.json", poisoned=made["poisoned"])
    detection.measure_filters(made["spec"], {"filters": asked, "taus": list(taus)}, inputs, outputs)
    return read_json(folder / "metrics.json")


def tidy(record: dict) -> pd.DataFrame:
    return pd.DataFrame(record["rows"]).fillna({"variant": ""}).set_index(["defence", "variant", "metric"]).sort_index()


def values_of(made: dict) -> np.ndarray:
    return pd.read_parquet(made["filtered"] / "entropies.parquet")[["layer_0", "layer_1", "layer_2"]].to_numpy()


def test_rows_of_detection_are_what_the_flags_say(chain):
    made = chain["0.1"]
    rows = tidy(filter_all(made))
    bad = made["bad"]
    assert bad.sum() == 40
    values = values_of(made)
    for name in plan("smoke").filters():
        decision = read_json(made["filtered"] / "flags" / f"{name}.json")
        flagged = np.zeros(len(bad), bool)
        flagged[decision["flagged"]] = True
        place = name.partition("~")[::2]
        found = rows.loc[place].value
        precision, recall, f1, _ = precision_recall_fscore_support(bad, flagged, average="binary", zero_division=0)
        assert np.allclose([found.precision, found.recall, found.f1], [precision, recall, f1])
        assert found.left == (bad & ~flagged).sum() and found.flagged == flagged.sum()
        assert np.isclose(found.false_alarm, (flagged & ~bad).sum() / (~bad).sum())
    assert rows.loc[("bye", "", "f1"), "value"] == 1 and rows.loc[("bye", "", "sensitive_layers"), "value"] == 2
    assert rows.loc[("bye", "", "recall"), "n"] == 40 and rows.loc[("random_drop", "", "flagged"), "value"] == 80
    assert np.isclose(rows.loc[("without_bsi", "", "auroc"), "value"], roc_auc_score(bad, -values.mean(1)))
    assert ("random_drop", "", "auroc") not in rows.index and ("oracle", "", "auroc") not in rows.index
    # 0.708 ln 64 = 2.94 nats lies between 2.0 and 3.5
    assert rows.loc[("without_gmm", "", "f1"), "value"] == 1
    record = read_json(made["filtered"] / "filters.json")
    assert [layer["auroc"] for layer in record["layers"]][1:] == [1.0, 1.0]
    assert record["poisoned"] == np.flatnonzero(bad).tolist()


def test_the_sweep_by_hand(chain):
    made = chain["0.1"]
    rows = tidy(filter_all(made, taus=(0.0, 2.0, 50.0)))
    values = values_of(made)
    assert rows.loc[("bye", "sum_tau50", "sensitive_layers"), "value"] == 0
    assert rows.loc[("bye", "rss_tau50", "flagged"), "value"] == 0
    assert rows.loc[("bye", "rss_tau0", "sensitive_layers"), "value"] == 3
    assert rows.loc[("bye", "sum_tau2", "f1"), "value"] == rows.loc[("bye", "", "f1"), "value"]
    # with all layers the decision is that on their mean: a mixture of 3.5 and of 2.5 with spread 0.06
    flagged = values.mean(1) < 3.0
    assert rows.loc[("bye", "rss_tau0", "flagged"), "value"] == flagged.sum()


def test_without_poison_every_flag_is_a_false_alarm(chain):
    rows = tidy(filter_all(chain["0"]))
    assert ("bye", "", "f1") not in rows.index and ("bye", "", "recall") not in rows.index
    assert rows.loc[("bye", "", "flagged"), "value"] == 0 == rows.loc[("bye", "", "sensitive_layers"), "value"]
    # no layer is selected for this one: the mixture divides what is one heap
    assert rows.loc[("without_bsi", "", "false_alarm"), "value"] > 0.05
    assert "nothing is flagged" in read_json(chain["0"]["filtered"] / "filters.json")["filters"]["bye"]["record"]["message"]


def test_filters_of_a_failed_victim_are_failed_cells(chain):
    made = chain["0.1"]
    write_json(made["filtered"] / "attention.json", {"failed": "its victim failed: Diverged: the loss became nan"})
    assert filter_all(made)["status"] == "failed"
    cell = {"paper": "bye", "stage": "filtered", "dataset": "shapes_tiny", "model": "micro_llava", "recipe": "micro_lora",
            "attack": "square~quarter", "rate": "0.1", "seed": "0", "folder": str(made["filtered"])}
    table = tables.gather([cell])
    assert list(table.status) == ["failed"] and "Diverged" in table.reason[0] and table.metric[0] == "f1"
    outputs = {name: made["filtered"] / "refit" / file for name, file in (
        ("history", "history.csv"), ("clean", "c.parquet"), ("triggered", "t.parquet"), ("metrics", "metrics.json"))}
    write_json(made["filtered"] / "victim.json", {"status": "ok", "metrics": [], "model_sha256": digest(made["poisoned"])})
    inputs = Inputs(before=made["filtered"] / "victim.json", victim=made["poisoned"], poisoned=made["poisoned"],
                    flags=made["filtered"] / "flags" / "bye.json")
    stages.refit(made["spec"], plan("smoke").defence({"defence": "bye"}), inputs, outputs, "cpu")
    record = read_json(outputs["metrics"])
    assert record["status"] == "failed" and "its filter failed" in record["reason"] and outputs["clean"].exists()


def test_one_filter_that_fails_does_not_stop_the_others(chain):
    made = chain["0.1"]
    rows = filter_all(made, (), {"bye": {"function": "bye", "settings": {"rule": "none"}},
                                 "oracle": {"function": "oracle", "settings": {}}})["rows"]
    assert [row["status"] for row in rows if row["defence"] == "bye"] == ["failed"]
    assert next(row["value"] for row in rows if row["defence"] == "oracle" and row["metric"] == "f1") == 1
    assert "rule" in read_json(made["filtered"] / "flags" / "bye.json")["failed"]


def test_fitting_again_on_everything_is_the_victim(chain, tmp_path):
    before, flags = tmp_path / "victim" / "metrics.json", tmp_path / "bye.json"
    write_json(before, {"status": "ok", "metrics": ["cp", "asr"], "cp": 0.8, "cp_n": 40, "cp_low": 0.7, "cp_high": 0.9,
                        "asr": 0.9, "rate_reached": 0.1, "model_sha256": digest(chain["0.1"]["poisoned"])})
    for name in ("clean", "triggered"):
        pd.DataFrame({"id": ["a"], "answer": ["yes"]}).to_parquet(tmp_path / "victim" / f"answers_{name}.parquet")
    write_json(flags, {"flagged": [], "of": 400})
    out = {"history": tmp_path / "o" / "history.csv", "metrics": tmp_path / "o" / "metrics.json",
           **{name: tmp_path / "o" / f"answers_{name}.parquet" for name in ("clean", "triggered")}}
    made = chain["0.1"]
    inputs = Inputs(before=before, victim=made["poisoned"], flags=flags, poisoned=made["poisoned"])
    stages.refit(made["spec"], plan("smoke").defence({"defence": "bye"}), inputs, out, "cpu")
    record = read_json(out["metrics"])
    assert record["reused"] and (record["cp"], record["asr"], record["cp_n"]) == (0.8, 0.9, 40)
    assert (record["removed"], record["left"], record["left_share"]) == (0, 40, 0.1) and record["metrics"][:2] == ["cp", "asr"]
    assert pd.read_parquet(out["clean"]).answer[0] == "yes"
    write_json(flags, {"flagged": list(range(400)), "of": 400})
    stages.refit(made["spec"], plan("smoke").defence({"defence": "bye"}), inputs, out, "cpu")
    assert "removed all 400 samples" in read_json(out["metrics"])["reason"]


# ------------------------------------------------------------------------------------------------------------- purification


def test_purified_pictures_keep_questions_and_sharing(tmp_path):
    shapes.prepare(tmp_path / "source", train=4, test=6)
    purification.purified_copy(tmp_path / "source", tmp_path / "out", lambda pictures: 255 - pictures)
    before, after = (load(tmp_path / name, "test") for name in ("source", "out"))
    assert [r["question"] for r in before.records] == [r["question"] for r in after.records]
    assert after[0]["image"] == after[1]["image"] != after[2]["image"]
    assert all(np.array_equal(255 - before.image(k), after.image(k)) for k in range(6))


def test_claims_ask_for_what_the_cells_have():
    content = read_yaml(PAPERS / "bye" / "claims.yaml")
    check_schema(content, schema("claims"), "claims.yaml")
    measured = {*stages.MEASURED, *detection.DETECTED, *detection.HAZARDS}
    assert {claim["test"]["metric"] for claim in content["claims"]} <= measured
    ids = [claim["id"] for claim in content["claims"]]
    assert len(set(ids)) == len(ids)


# ------------------------------------------------------------------------------------------------------------------- the DAG


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("bye"), tmp_path_factory.mktemp("data"))
    folder.set(papers=["bye"])
    code, output = folder.run()
    assert code == 0, output[-4000:]
    return folder


@pytest.mark.slow
def test_smoke_ends_with_the_report(finished):
    results = finished.path / "results" / "smoke"
    page = (results / "papers" / "bye" / "report.html").read_text()
    assert "Backdoor Cleaning" in page and "Hazards" in page and "maps_shapes_tiny_micro_llava.svg" in page
    cells = pd.read_parquet(results / "cells.parquet")
    assert set(cells.status) == {"ok"} and set(cells.stage) == {"victim", "filtered", "purified"}
    assert set(cells[cells.stage == "filtered"].defence) >= {"bye", "random_drop", "two_means", "oracle"}
    assert {"cp", "asr", "asr_contains", "f1", "auroc", "left"} <= set(cells.metric)
    made = read_json(results / "provenance.json")
    assert made["data"]["vision_language/shapes_tiny"]["source"]["kind"] == "generated"
    for name in ("report.html", "card.md", "claims.csv", "tables/table8_hazards.md", "figures/captions.json"):
        assert (results / "papers" / "bye" / name).stat().st_size > 0
    code, output = finished.run("-n")
    assert code == 0 and "Nothing to be done" in output, output[-3000:]


@pytest.mark.slow
def test_refits_leave_out_what_their_filter_flagged(finished):
    found = {(record["stage"], record["defence"]): record for record in finished.metrics().values()}
    victim, random, bye = found["victim", ""], found["purified", "random_drop"], found["purified", "bye"]
    assert victim["poisoned"] == 32 == random["removed"] and not random["reused"] and victim["cp"] > 0.5
    rows = tidy(found["filtered", ""]).value
    assert (bye["removed"], bye["left"]) == (rows["bye", "", "flagged"], rows["bye", "", "left"])
    assert bye["reused"] == (bye["removed"] == 0) and bye["asr_before"] == victim["asr"]


@pytest.mark.slow
def test_a_setting_of_one_filter_fits_nothing_again_unless_its_decision_changes(finished):
    file = "workflow/papers/bye/experiment.yaml"
    finished.edit(file, "settings: {share: 0.2}", "settings: {share: 0.20}")
    assert "Nothing to be done" in finished.run("-n")[1]
    finished.edit(file, "recall: 1.0}", "recall: 0.9}")  # only detection asks for the oracle here
    planned = jobs(finished.run("-n")[1])
    assert planned["measure_filters"] == 1 and "train_vision_language_victim" not in planned and "read_attention" not in planned
    code, output = finished.run("--", "results/smoke/cells.parquet")
    assert code == 0, output[-3000:]
    log = max((finished.path / ".snakemake" / "log").iterdir()).read_text()  # their names begin with the time
    assert "rule measure_filters" in log and "rule refit" not in log  # the decisions of BYE are what they were
    finished.edit(file, "recall: 0.9}", "recall: 1.0}")
    assert finished.run("--", "results/smoke/cells.parquet")[0] == 0


@pytest.mark.slow
def test_scripts_know_plugins(finished):
    file = "workflow/papers/bye/experiment.yaml"
    plugin(finished.path)
    finished.edit(file, "  dual: {label", "  band: {source: own}\n  dual: {label")
    target = "results/smoke/vision_language/poisoned/shapes_tiny/band@0.2/seed0/poison.json"
    code, output = finished.run("--config", "plugins=[my_pictures.py]", "--", target)
    finished.edit(file, "  band: {source: own}\n  dual: {label", "  dual: {label")
    assert code == 0, output[-3000:]
    assert read_json(finished.path / target)["parameters"] == {"height": 4}


@pytest.mark.slow
def test_the_same_run_gives_the_same_numbers(finished):
    before = finished.metrics()
    for name in ("victims", "filtered", "purified", "bases", "poisoned", "triggered"):
        shutil.rmtree(finished.path / "results" / "smoke" / "vision_language" / name)
    (finished.path / "results" / "smoke" / "cells.parquet").unlink()  # or there would be nothing to be done
    code, output = finished.run("--", "results/smoke/cells.parquet")
    assert code == 0, output[-3000:]
    drop = ("train_seconds", "seconds", "samples_per_second")
    after = finished.metrics()
    assert {k: {a: b for a, b in v.items() if a not in drop} for k, v in after.items()} == {
        k: {a: b for a, b in v.items() if a not in drop} for k, v in before.items()}
