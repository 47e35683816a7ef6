"""What a method does wrong is a failed cell with its reason, in every family; what the machine does wrong ends the job."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from cupel.cells import ChangedVictim, failure
from cupel.experiment import Grid
from cupel.files import digest, read_json, write_json
from cupel.robust import measure
from cupel.settings import PAPERS, ConfigError, read_yaml
from cupel.vision_language import attention, detection, entropy, filters, models, prepared, purification, stages, triggers
from cupel.vision_language.datasets import shapes
from cupel.vision_language.inputs import Inputs
from tests.test_vision_language_dag import cell, filter_all, make_chain, plan
from tests.test_vision_language_model import small_llava

CELL = cell("shapes_tiny", "micro_llava", "micro_lora", "square~quarter", "0.1", "0")


@pytest.fixture(scope="module")
def shapes_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes_tiny"
    shapes.prepare(folder, train=40, test=8, pretrain=8)
    return folder


def victim(folder, data, **changes) -> dict:
    """What the workflow makes for a victim, from the base model on; its record."""
    spec = {**plan("smoke").victim(CELL), **changes}
    stages.build(spec, data, {"model": folder / "base", "history": folder / "h.csv", "record": folder / "base.json"}, "cpu")
    stages.poison({key: value for key, value in spec.items() if key != "poison_rate"}, data, folder / "triggered")
    stages.poison(spec, data, folder / "poisoned")
    out = {"model": folder / "model", "history": folder / "history.csv", "clean": folder / "clean.parquet",
           "triggered": folder / "answers.parquet", "metrics": folder / "metrics.json"}
    inputs = Inputs(data=data, poisoned=folder / "poisoned", triggered=folder / "triggered", base=folder / "base")
    stages.train_victim(spec, inputs, out, "cpu")
    return read_json(out["metrics"])


def look(folder, data) -> dict:
    """Attention and filters of a victim; the record of the filters."""
    spec, names = plan("smoke").victim(CELL), plan("smoke").filters()
    inputs = Inputs(victim=folder / "model", before=folder / "metrics.json", poisoned=folder / "poisoned", data=data,
                    triggered=folder / "triggered", entropies=folder / "e.parquet", attention=folder / "attention.json")
    attention.read_attention(spec, inputs, {"entropies": folder / "e.parquet", "maps": folder / "maps.npz",
                                            "record": folder / "attention.json"}, "cpu")
    detection.measure_filters(spec, {"filters": names, "taus": [2.0]}, inputs, {
        "flags": {name: folder / f"{name}.json" for name in names}, "record": folder / "filters.json",
        "metrics": folder / "filtered.json"})
    return read_json(folder / "filtered.json")


def wrong(*given, **more):
    raise RuntimeError("Tensors must have same number of dimensions")


def full(*given, **more):
    raise OSError(28, "No space left on device")


def test_a_trigger_that_fails_is_a_failed_vision_language_victim(tmp_path, shapes_data, monkeypatch):
    for name, function in (("wrong", wrong), ("idle", lambda image, seed, key: image.copy()),
                           ("floats", lambda image, seed, key: image / 255)):
        monkeypatch.setitem(triggers.trigger, name, function)
        record = victim(tmp_path / name, shapes_data, attack={"name": name, "function": name, "settings": {}})
        assert record["status"] == "failed" and "its trigger failed" in record["reason"], record
        assert {"wrong": "number of dimensions", "idle": "no pixel", "floats": "float64"}[name] in record["reason"]
    monkeypatch.setitem(triggers.trigger, "wrong", full)
    with pytest.raises(OSError, match="No space"):
        stages.poison({**plan("smoke").victim(CELL), "attack": {"name": "wrong", "function": "wrong", "settings": {}}},
                      shapes_data, tmp_path / "full")


def test_a_model_that_cannot_be_built_is_a_failed_victim(tmp_path, shapes_data, monkeypatch):
    monkeypatch.setattr(models, "tiny_llava", wrong)
    record = victim(tmp_path, shapes_data)
    assert record["status"] == "failed" and "starts from failed: RuntimeError: Tensors must" in record["reason"]
    assert read_json(tmp_path / "base.json")["status"] == "failed" and (tmp_path / "base").is_dir()
    monkeypatch.setattr(models, "tiny_llava", full)
    with pytest.raises(OSError, match="No space"):
        victim(tmp_path, shapes_data)


def looked_at(folder, data):
    """A folder as that of a victim, whose network was never trained."""
    folder.mkdir(exist_ok=True)
    stages.poison({key: value for key, value in plan("smoke").victim(CELL).items() if key != "poison_rate"}, data,
                  folder / "triggered")
    stages.poison(plan("smoke").victim(CELL), data, folder / "poisoned")
    models.save(small_llava(), folder / "model")
    write_json(folder / "metrics.json", {"status": "ok", "model_sha256": digest(folder / "model")})


def test_attention_that_cannot_be_read_fails_the_filters_with_its_reason(tmp_path, shapes_data, monkeypatch):
    looked_at(tmp_path, shapes_data)
    assert look(tmp_path, shapes_data)["status"] == "ok"
    monkeypatch.setattr(entropy, "extract", wrong)
    record = look(tmp_path, shapes_data)
    assert record["status"] == "failed" and "number of dimensions" in record["reason"]
    assert len(pd.read_parquet(tmp_path / "e.parquet")) == 0
    monkeypatch.setattr(entropy, "extract", full)
    with pytest.raises(OSError, match="No space"):
        look(tmp_path, shapes_data)


def test_entropies_that_are_nowhere_finite_decide_nothing():
    with pytest.raises(ValueError, match="no entropy of any layer is finite"):
        filters.Evidence(np.full((4, 2), np.nan))
    assert filters.Evidence(np.array([[np.nan, 1.0], [np.nan, 2.0]])).replaced == 2


def test_a_filter_that_returns_no_decision_fails_alone(tmp_path, monkeypatch):
    odd = {"bare": (lambda evidence: evidence.none(), "must return a Decision"),
           "short": (lambda evidence: filters.Decision(np.zeros(3, bool)), "flagged is bool [3]"),
           "counts": (lambda evidence: filters.Decision(np.zeros(len(evidence), int)), "not bool"),
           "numpy": (lambda evidence: filters.Decision(evidence.none(), None, {"found": np.int64(1)}), "not JSON serializable")}
    for name, (function, _) in odd.items():
        monkeypatch.setitem(filters.sample_filter, name, function)
    asked = {name: {"function": name, "settings": {}} for name in (*odd, "oracle")}
    rows = filter_all(make_chain(tmp_path)["0.1"], (), asked)["rows"]
    failed = {row["defence"]: row["reason"] for row in rows if row.get("status") == "failed"}
    assert list(failed) == list(odd) and all(reason in failed[name] for name, (_, reason) in odd.items())


def test_a_picture_defence_must_return_pictures(monkeypatch):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for name, function in (("none", lambda images, generator: None), ("nan", lambda images, generator: images * torch.nan),
                           ("cut", lambda images, generator: images[:1])):
        monkeypatch.setitem(purification.picture_defence, name, function)
        with pytest.raises(ValueError, match="must return finite images"):
            purification.purify(name, images)


@pytest.mark.parametrize(("paper", "place", "value", "words"), [
    ("bye", "attacks.square.settings", {"divisor": 0}, "at least 1"),
    ("bye", "attacks.blend.settings", {"alpha": 0}, "above 0"),
    ("bye", "attacks.blend.settings", {"alpha": "0.2"}, "of type number"),
    ("bye", "attacks.multi.settings", {"layout": "spiral"}, "allowed are fixed, drawn"),
    ("bye", "attacks.sig.settings", {"delta": 0.0}, "above 0"),
    ("bye", "defences.bye.settings", {"tau": "two"}, "of type number"),
    ("bye", "defences.downsample.settings", {"scale": 0}, "at least 1"),
    ("bye", "defences.blur.settings", {"sigma": 0.0}, "above 0"),
    ("bye", "recipes.micro_lora.settings", {"training": {"epochs": 1}}, "training.lr is not set"),
    ("bye", "recipes.micro_lora.settings.training", {"epochs": 1, "lr": 0}, "above 0"),
    ("crow", "defences.crow.settings.consistency", {"alpha": -1}, "at least 0"),
    ("crow", "defences.crow.settings.training", {"epochs": 0}, "at least 1"),
    ("bye", "models.micro_llava", {"source": "own", "folder": "nowhere"}, "nowhere has no config.json"),
    ("crow", "scales.smoke.blocks.0.budgets", [], "at least one budget"),
    ("crow", "recipes.crow.scales.smoke.evaluation.mt_bench", "nowhere.jsonl", "there is no file nowhere.jsonl"),
    ("proper_interpretability", "evaluations.sweep.settings.pgd", {"eps": [8]}, "at most 1"),
    ("proper_interpretability", "evaluations.sweep.settings.pgd", {"eps": ["300/255"]}, "above 1"),
    ("proper_interpretability", "evaluations.sweep.settings.pgd", {"eps": [0.1], "step_size": "0/255"}, "is not a number"),
    ("proper_interpretability", "evaluations.sweep.settings.pgd", {"eps": [0.1], "steps": [0]}, "at least 1"),
    ("proper_interpretability", "evaluations.sweep.settings.aai", {"eps": [0.1], "k": "8"}, "of type integer"),
    ("proper_interpretability", "evaluations.isa_maps.settings.isa", {"norms": ["l3"], "multipliers": [1.5]}, "l1, l2"),
    ("proper_interpretability", "evaluations.sweep.scales.smoke.points", {"count": 20000}, "10000 test images"),
    ("proper_interpretability", "recipes.main.datasets.mnist.inner.eps", 8, "8 of 255 levels are 8/255"),
    ("proper_interpretability", "recipes.main", {"source": "own", "settings": {
        "inner": {"eps": 0.1, "ramp": [0, 1], "steps": 1, "step_size": 0.1}, "training": {"epochs": 1, "lr": 0.1}}},
     "training.batch_size is not set"),
    ("fst", "recipes.fst.settings.model", {"depth": 3}, "unknown key 'depth'"),
    ("fst", "recipes.fst.settings.model", {"width": 0}, "at least 1"),
    ("fst", "recipes.fst.settings.training", {"epochs": 1}, "training.lr is not set"),
    ("fst", "recipes.fst.settings.held_out", 0, "holds out none"),
    ("fst", "budgets.few", {"source": "own", "settings": {"kind": "spc"}}, "needs spc"),
    ("fst", "scales.smoke.blocks.0.budgets", [], "at least one budget"),
    ("fst", "scales.smoke.blocks.0.models", ["mobilenet_v3_large"], "unknown setting of model mobilenet_v3_large '"),
    ("fst", "attacks.longer", {"source": "own", "function": "badnets", "training": {"settings": {"epochs": 0}}}, "at least 1")])
def test_values_of_every_family_are_refused_before_the_first_job(tmp_path, paper, place, value, words):
    content, (*path, last) = read_yaml(PAPERS / paper / "experiment.yaml"), place.split(".")
    (tmp_path / paper).mkdir()
    (tmp_path / "shared").symlink_to(PAPERS / "shared")
    part = content
    for key in path:
        part = part[int(key)] if isinstance(part, list) else part.setdefault(key, {})
    part[last] = value
    (tmp_path / paper / "experiment.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refusal:
        Grid([paper], "smoke", folder=tmp_path)
    assert words in str(refusal.value)


def test_a_budget_of_one_image_a_class_cannot_be_divided(tmp_path):
    content = read_yaml(PAPERS / "fst" / "experiment.yaml")
    content["budgets"] = {"one": {"source": "own", "settings": {"kind": "spc", "spc": 1}}}
    content["defences"]["mine"] = {"source": "own", "function": "anp"}
    content["scales"]["smoke"]["blocks"][0] |= {"budgets": ["one"], "defences": ["ft", "mine"]}
    (tmp_path / "fst").mkdir()
    (tmp_path / "shared").symlink_to(PAPERS / "shared")
    (tmp_path / "fst" / "experiment.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="budget one has one image of each class, and mine sets some aside"):
        Grid(["fst"], "smoke", folder=tmp_path)


def test_a_network_takes_what_it_can(tmp_path):
    from cupel.images.experiment import FORM
    from cupel.images.models import _DEFAULTS

    assert {key: _DEFAULTS[key] for key in FORM} == FORM


def test_whoever_calls_is_refused_too(tmp_path, shapes_data):
    from cupel.text import defences
    from cupel.vision_language.poison import trigger_test
    from tests.test_robust_dag import tiny, tiny_set

    with pytest.raises(ValueError, match="at least 1"):
        trigger_test(shapes_data, tmp_path, function="square", seed=0, parameters={"divisor": 0})
    with pytest.raises(ValueError, match="at least 0"):
        filters.decide("bye", filters.Evidence(np.zeros((4, 2))), tau=-1.0)
    with pytest.raises(ValueError, match="above 0"):
        purification.purify("blur", np.zeros((1, 8, 8, 3), np.uint8), sigma=0.0)
    with pytest.raises(ValueError, match="above 0"):
        defences.purify("crow", None, None, training={"lr": 0})
    asked = {"settings": {"pgd": {"eps": [8]}, "points": {"count": 12}}, "train_eps": 0.1, "seed": 0}
    with pytest.raises(ValueError, match="at most 1"):
        measure.evaluate(tiny(), tiny_set(), asked, tmp_path, "cpu")


def test_a_damaged_file_ends_the_job_and_is_no_failed_cell(tmp_path, shapes_data):
    from cupel.images.models.pretrained import WeightsUnavailable
    from cupel.prepared import read_records
    from cupel.sources import NoSource
    from cupel.text.models import load_model, load_tokenizer, tiny_llama

    def cut(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    looked_at(tmp_path / "victim", shapes_data)
    look(tmp_path / "victim", shapes_data)
    models.save(small_llava(), tmp_path / "llava")
    tiny_llama(tmp_path / "llama", 0)
    (tmp_path / "records.jsonl").write_text('{"a": 1}\n{"a":')
    for file in ("victim/e.parquet", "victim/poisoned/images.npy", "llava/model.safetensors", "llama/model.safetensors",
                 "llama/tokenizer.json"):
        cut(tmp_path / file)
    inputs = Inputs(entropies=tmp_path / "victim" / "e.parquet", attention=tmp_path / "victim" / "attention.json",
                    poisoned=tmp_path / "victim" / "poisoned")
    reads = {"parquet": lambda: detection.measure_filters(plan("smoke").victim(CELL), {"filters": {}, "taus": []}, inputs, {}),
             "pictures": lambda: prepared.load(tmp_path / "victim" / "poisoned", "train").image(0),
             "llava": lambda: models.load(tmp_path / "llava"), "llama": lambda: load_model(tmp_path / "llama"),
             "tokenizer": lambda: load_tokenizer(tmp_path / "llama"),
             "records": lambda: read_records(tmp_path / "records.jsonl")}
    for read in reads.values():
        with pytest.raises(OSError):
            read()
    for error in (NoSource("no network"), WeightsUnavailable("no network")):
        with pytest.raises(OSError, match="no network"):
            failure(error)


def test_prepared_data_that_lack_a_file_say_how_to_make_it_again(tmp_path, shapes_data):
    from cupel.text.models import load_model, load_tokenizer, tiny_llama

    tiny_llama(tmp_path / "a model", 0)
    (tmp_path / "a model" / "model.safetensors").unlink()
    for read in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors; make it again with: .* --force '.*model/man"):
            read(tmp_path / "a model")
    shutil.copytree(shapes_data, tmp_path / "shapes")
    (tmp_path / "shapes" / "images.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks images\.npy; make it again"):
        prepared.load(tmp_path / "shapes", "train")


def test_a_plugin_that_fails_leaves_its_row_out_of_the_sheet(tmp_path, cifar10, monkeypatch):
    from cupel.images import attacks
    from cupel.reporting import pictures

    class Wrong(attacks.Attack):
        def stamp(self, images):
            raise ValueError("no such pixel")

    monkeypatch.setitem(attacks.ATTACKS, "wrong", Wrong)
    spec = {name: ({"function": name, "settings": {}}, None) for name in ("badnets", "wrong")}
    pictures.contact_sheet(str(cifar10), spec, {"sheet": tmp_path / "sheet.png", "pictures": tmp_path / "one"}, count=2)
    assert (tmp_path / "sheet.png").is_file() and [path.name for path in (tmp_path / "one").iterdir()] == ["badnets.png"]
    assert pictures.stamped_or_none("wrong", spec["wrong"][0], None, np.zeros((1, 8, 8, 3), np.uint8)) is None


def test_reports_of_papers_do_without_reported_numbers():
    from cupel.reporting.paper import read_reported

    found = read_reported([])
    assert found.empty and not found.source.str.startswith("BYE").any() and found.model.replace({"a": "b"}).empty


def test_one_defence_of_a_language_model_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    from cupel.own import language
    from cupel.text import defences
    from cupel.text.models import tiny_llama

    tiny_llama(tmp_path / "model", 0)
    (tmp_path / "clean.jsonl").write_text('{"instruction": "Say yes", "output": "yes"}\n' * 4)
    usual = defences.purify
    monkeypatch.setattr(defences, "purify", lambda name, *given, **more: (wrong if name == "finetune" else usual)(
        name, *given, **more))
    few = {"epochs": 1, "batch_size": 2}
    rows = language.purify(str(tmp_path / "model"), tmp_path / "clean.jsonl", tmp_path / "out", tokens=2, device="cpu",
                           settings={"crow": few, "finetune": few})
    assert all(row["finetune"].startswith("failed: RuntimeError: Tensors") and "failed" not in row["crow"] for row in rows)


def test_a_base_model_that_was_changed_is_not_fine_tuned(tmp_path, shapes_data):
    models.save(small_llava(), tmp_path / "base")
    write_json(tmp_path / "base.json", {"status": "ok", "model_sha256": digest(tmp_path / "base")})
    spec = plan("smoke").victim(CELL)
    assert stages.weights(spec, tmp_path / "base", "cpu").layers
    (tmp_path / "base" / "cupel.json").write_text("{}")
    with pytest.raises(ChangedVictim, match="remove both and run"):
        stages.weights(spec, tmp_path / "base", "cpu")


def test_pictures_that_stay_as_they_are_say_so(tmp_path, shapes_data, monkeypatch):
    looked_at(tmp_path, shapes_data)
    record = read_json(tmp_path / "metrics.json")
    write_json(tmp_path / "metrics.json", {**record, "rate_reached": 0.1, "cp": 0.5, "asr": 0.5})
    inputs = Inputs(victim=tmp_path / "model", before=tmp_path / "metrics.json", data=shapes_data,
                    triggered=tmp_path / "triggered")
    for name, unchanged in (("idle", True), ("grey", False)):
        if name == "idle":
            monkeypatch.setitem(purification.picture_defence, name, lambda images, generator: images)
        out = {"history": tmp_path / name / "h.csv", "clean": tmp_path / name / "c.parquet",
               "triggered": tmp_path / name / "t.parquet", "metrics": tmp_path / name / "metrics.json"}
        (tmp_path / name).mkdir()
        purification.purify_pictures(plan("smoke").victim(CELL), {"name": name, "function": name, "settings": {},
                                                                  "budget": {"name": ""}}, inputs, out, "cpu")
        assert read_json(out["metrics"])["unchanged"] is unchanged


def test_parameters_of_filters_and_evaluations_stand_in_their_rows(tmp_path):
    rows = filter_all(make_chain(tmp_path)["0.1"], (2.0,), {"bye": {"function": "bye", "settings": {"tau": 1.5}}})["rows"]
    assert {row["defence_parameters"] for row in rows if row["variant"] == ""} == {'{"tau": 1.5}'}
    spec = {"dataset": "mnist", "model": "small", "recipe": "r", "method": "adv", "seed": 0, "parameters": {},
            "settings": {"inner": {"eps": 0.1}}}
    write_json(tmp_path / "before.json", {"status": "failed", "reason": "r"})
    measure.attack_network(spec, {"pgd": {"eps": [0.1]}}, measure.Network("", "", str(tmp_path / "before.json")),
                           {"arrays": tmp_path / "a.npz", "metrics": tmp_path / "m.json"}, "cpu")
    assert read_json(tmp_path / "m.json")["attack_parameters"] == '{"pgd": {"eps": [0.1]}}'


def test_a_reference_that_failed_fails_the_defence_and_not_the_job(tmp_path):
    from cupel.text import stages as text

    for name in ("victim", "reference"):
        (tmp_path / name / "model").mkdir(parents=True)
        write_json(tmp_path / name / "metrics.json", {"status": "ok", "model_sha256": digest(tmp_path / name / "model"),
                                                      "reason": "Diverged"})
    write_json(tmp_path / "reference" / "metrics.json", {"status": "failed", "reason": "Diverged"})
    data = {part: tmp_path / f"{part}.jsonl" for part in text.PARTS}
    for path in (*data.values(), tmp_path / "manifest.json"):
        path.write_text("")
    outputs = {name: tmp_path / "out" / name for name in ("model", "answers")} | {
        name: tmp_path / "out" / f"{name}.csv" for name in ("history", "layers")} | {"metrics": tmp_path / "out" / "m.json"}
    spec = {"dataset": "refusal", "model": "tiny", "recipe": "r", "attack": {"name": "vpi"}, "poison_rate": 0.5, "seed": 0,
            "settings": {"training": {"precision": "fp32"}, "evaluation": {"precision": "fp32"}}}
    defence = {"name": "cleangen", "function": "cleangen", "settings": {}, "budget": {"name": "few", "size": 2}}
    text.purify(spec, defence, text.Files(tmp_path, data, outputs, tmp_path / "victim" / "model", tmp_path / "victim" /
                                          "metrics.json", tmp_path / "reference" / "model"), "cpu")
    assert "compares with failed: Diverged" in read_json(outputs["metrics"])["reason"]


def test_the_table_of_data_tells_of_a_model_that_could_not_be_built(tmp_path, shapes_data):
    from types import SimpleNamespace

    from cupel.reporting.paper import load, read_reported

    write_json(tmp_path / "base.json", {"dataset": "shapes_tiny", "model": "micro_llava", "status": "failed", "reason": "r"})
    paper = SimpleNamespace(files={"bases": [tmp_path / "base.json"]}, facts={"datasets": {"shapes_tiny": shapes_data}},
                            reported=read_reported([]))
    table = load(PAPERS / "bye" / "report.py").data_table(paper, SimpleNamespace(settings=[]))
    assert table.loc["shapes_tiny", "micro_llava: weights"] == "failed"
