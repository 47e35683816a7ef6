"""What a method does wrong is a failed cell with its reason, in every family; what the machine does wrong ends the job."""

import numpy as np
import pandas as pd
import pytest
import torch

from cupel.files import digest, read_json, write_json
from cupel.vision_language import attention, detection, entropy, filters, models, purification, stages, triggers
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
