"""What is measured is what was saved, is finite, and is told from nothing: every case here once gave a good-looking number."""

import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cupel.cells import ChangedVictim
from cupel.files import read_json
from cupel.images import attacks, defences, models, stages
from cupel.training.engine import Diverged, Recipe, cuts, finite_outputs, fit, predict

CELL = {"dataset": "cifar10", "model": "preactresnet18", "recipe": "r", "poison_rate": 0.1, "seed": 0,
        "attack": {"name": "badnets", "function": "badnets", "settings": {}},
        "settings": {"target": 7, "train_size": 200, "test_size": 100, "model": {"width": 8, "stem_stride": 2},
                     "training": {"epochs": 1, "lr": 0.1, "batch_size": 50}}}


def files(folder, *names):
    return {name.partition(".")[0]: str(folder / name) for name in names}


def train(folder, data, **changes) -> dict:
    """A victim as the workflow makes it; its record."""
    spec, out = CELL | changes, files(folder, "model.safetensors", "trigger.npz", "history.csv", "metrics.json")
    stages.poison(spec, data, None, folder / "poison.npz")
    stages.train_victim(spec, stages.Inputs(data, record=folder / "poison.npz"), out, "cpu")
    return read_json(out["metrics"])


def purify(folder, data, function) -> dict:
    """A defence on the victim in a folder; its record."""
    out = files(folder / "after", "model.safetensors", "history.csv", "metrics.json")
    inputs = stages.Inputs(data, victim=folder / "model.safetensors", trigger=folder / "trigger.npz",
                           before=folder / "metrics.json")
    defence = {"name": function, "function": function, "settings": {}, "budget": {"name": "spc2", "kind": "spc", "spc": 2}}
    stages.purify(CELL, defence, inputs, out, "cpu")
    return read_json(out["metrics"])


@pytest.fixture(scope="module")
def victim(tmp_path_factory, cifar10):
    """Folder of a victim that saw one epoch, and the folder of data."""
    folder = tmp_path_factory.mktemp("victim")
    train(folder, str(cifar10.parent))
    return folder, str(cifar10.parent)


def broken(network, how):
    if how == "weights":
        network.head.weight.data[3, 2] = torch.nan
    elif how == "statistics":
        next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_mean.fill_(torch.inf)
    elif how == "classes":
        network.head = torch.nn.Linear(network.head.in_features, 5)
    elif how == "half":
        network.half().register_forward_pre_hook(lambda module, given: (given[0].half(),))
    elif how == "hook":
        network.register_forward_hook(lambda module, given, output: output.roll(1, 1))
    elif how == "module":
        return torch.nn.Sequential(network)
    return network


@pytest.mark.parametrize(("how", "reason"), [
    ("weights", "not all finite"), ("statistics", "not all finite"), ("classes", "does not fit the model"),
    ("half", "torch.float16"), ("hook", "answers otherwise once it is saved"), ("module", "no spec")])
def test_a_network_that_its_file_does_not_hold_is_a_failed_cell(victim, monkeypatch, how, reason):
    monkeypatch.setitem(defences.DEFENCES, "broken", lambda victim, budget, rng: (broken(copy.deepcopy(victim), how), []))
    record = purify(*victim, "broken")
    assert record["status"] == "failed" and reason in record["reason"], record
    with pytest.raises(models.NotACheckpoint):
        models.load(victim[0] / "after" / "model.safetensors")


def test_what_did_nothing_and_what_left_nothing_say_so(victim, monkeypatch):
    def constant(victim, budget, rng):
        network = copy.deepcopy(victim)
        network.head.bias.data[7] = 1e6
        return network, []

    monkeypatch.setitem(defences.DEFENCES, "idle", lambda victim, budget, rng: (copy.deepcopy(victim), []))
    monkeypatch.setitem(defences.DEFENCES, "constant", constant)
    record = purify(*victim, "idle")
    assert record["unchanged"] and not record["destroyed"] and record["acc"] == record["acc_before"]
    before = read_json(victim[0] / "metrics.json")
    (victim[0] / "metrics.json").write_text(json.dumps({**before, "acc": 0.9}))
    record = purify(*victim, "constant")
    (victim[0] / "metrics.json").write_text(json.dumps(before))
    assert not record["unchanged"] and record["destroyed"]


def test_a_victim_that_was_changed_after_it_was_measured_is_not_purified(victim, monkeypatch, tmp_path):
    monkeypatch.setitem(defences.DEFENCES, "idle", lambda victim, budget, rng: (copy.deepcopy(victim), []))
    kept = (victim[0] / "model.safetensors").read_bytes()
    network = models.load(victim[0] / "model.safetensors")
    network.head.bias.data[0] += 1
    models.save(network, victim[0] / "model.safetensors")
    with pytest.raises(ChangedVictim, match="run the same command again"):
        purify(*victim, "idle")
    (victim[0] / "model.safetensors").write_bytes(kept)
    assert purify(*victim, "idle")["status"] == "ok"


@dataclass(frozen=True)
class Odd(attacks.Attack):
    how: str = ""

    def stamp(self, images):
        return {"floats": images / 255, "cut": images[:, 1:], "nothing": images.copy()}[self.how]


@pytest.mark.parametrize(("how", "reason"), [("floats", "float64"), ("cut", "not uint8"), ("nothing", "changes no pixel")])
def test_a_trigger_that_is_no_image_or_nothing_is_a_failed_victim(tmp_path, cifar10, monkeypatch, how, reason):
    monkeypatch.setitem(attacks.ATTACKS, "odd", Odd)
    record = train(tmp_path, str(cifar10.parent), attack={"name": "odd", "function": "odd", "settings": {"how": how}})
    assert record["status"] == "failed" and reason in record["reason"]


@pytest.mark.parametrize(("attack", "rate"), [("badnets", 0.0), ("badnets", 1e-6), ("bpp", 0.0)])
def test_a_rate_that_poisons_nothing_is_a_failed_victim(tmp_path, cifar10, attack, rate):
    record = train(tmp_path, str(cifar10.parent), attack={"name": attack, "function": attack, "settings": {}}, poison_rate=rate)
    assert record["status"] == "failed" and "poisoned" in record["reason"]


def test_a_last_step_that_diverges_is_seen():
    network = models.build("preactresnet18", num_classes=10, width=8, stem_stride=2, seed=0)
    images, labels = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8)
    with pytest.raises(Diverged, match="after the last step"):
        fit(network, images, labels, Recipe(epochs=1, lr=0.1),
            seed=0, after_step=lambda model: model.head.weight.data.fill_(torch.nan))
    with pytest.raises(Diverged):
        predict(network, images)
    with pytest.raises(ValueError, match="uint8"):
        predict(network, images / 255)


def test_no_batch_is_left_with_a_single_sample():
    assert [(part.start, part.stop) for part in cuts(100, 33)] == [(0, 33), (33, 66), (66, 100)]
    assert [part.stop for part in cuts(100, 33, drop_last=True)] == [33, 66, 99] and len(cuts(3, 1)) == 3
    assert [part.stop for part in cuts(1, 8)] == [1] and [part.stop for part in cuts(10, 4)] == [4, 8, 10]
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    budget = defences.Budget(images, np.arange(7), 10)
    network = models.build("mobilenet_v3_large", num_classes=10, seed=0)  # its squeeze sees one value a channel and image
    for name, settings in (("ft", {"epochs": 1}), ("pbe", {"rounds": 1, "steps": 1}), ("awn", {"epochs": 1})):
        _, history = defences.purify(name, network, budget, np.random.default_rng(0), batch_size=3, **settings)
        assert history


def test_a_language_model_that_computes_nan_answers_nothing():
    from cupel.text.generation import generate
    from tests.test_text_training import llama

    model = llama()
    with finite_outputs(model):
        assert generate(model, [[1, 2]], pad=0, eos=1, max_new_tokens=2)
        model.lm_head.weight.data[5] = torch.nan
        with pytest.raises(Diverged):
            generate(model, [[1, 2]], pad=0, eos=1, max_new_tokens=2)


def test_a_vision_language_model_that_computes_nan_answers_nothing():
    from cupel.vision_language.inference import answer
    from tests.test_vision_language_model import make_records, small_llava

    model = small_llava()
    assert len(answer(model, make_records(2), max_new_tokens=2)) == 2
    model.network.lm_head.weight.data[5] = torch.nan
    with pytest.raises(Diverged):
        answer(model, make_records(2), max_new_tokens=2)
    with pytest.raises(Diverged, match="after the last update"):
        from cupel.vision_language.training import TrainingSettings, fit

        fit(small_llava(), make_records(2), TrainingSettings(epochs=1, trained="all", lr=float("inf"), warmup=0, clip=None,
                                                        precision="fp32"), seed=0)


def test_a_robust_network_that_computes_nan_is_not_measured(tmp_path):
    from cupel.robust import measure
    from tests.test_robust_dag import tiny, tiny_set

    network, asked = tiny(), {"settings": {"pgd": {"eps": [0]}, "points": {"count": 12}}, "train_eps": 0.1, "seed": 0}
    assert measure.evaluate(network, tiny_set(), asked, tmp_path, "cpu")[0]
    (tmp_path / "pgd.npz").unlink()
    network.head.weight.data[0] = torch.nan
    with pytest.raises(Diverged):
        measure.evaluate(network, tiny_set(), asked, tmp_path, "cpu")


@pytest.mark.parametrize(("section", "name", "settings", "words"), [
    ("attacks", "badnets", {"pattern": "blue"}, "'blue' is not allowed; allowed are white, checkerboard"),
    ("attacks", "badnets", {"size": 0}, "at least 1"), ("attacks", "badnets", {"size": "3"}, "of type integer"),
    ("attacks", "blended", {"alpha": 0}, "above 0"), ("attacks", "blended", {"alpha": 1.5}, "at most 1"),
    ("attacks", "blended", {"alpha": "0.2"}, "of type number"), ("attacks", "blended_bypass", {"alpha": 0}, "above 0"),
    ("attacks", "lf", {"smaller": 0}, "above 0"), ("defences", "fst", {"lr": -0.1}, "above 0"),
    ("defences", "ft", {"batch_size": 0}, "at least 1"), ("defences", "ft", {"projected": "no"}, "of type boolean"),
    ("defences", "awn", {"clamp": "both"}, "allowed are pixel, normalised"), ("defences", "anp", {"epochs": 3}, "epochs")])
def test_values_are_checked_before_the_first_job_and_by_whoever_calls(section, name, settings, words):
    from cupel.settings import PAPERS, ConfigError, read_yaml
    from tests.conftest import planned

    content = read_yaml(PAPERS / "fst" / "experiment.yaml")
    content[section] = content.get(section, {}) | {name: {"source": "test", "scales": {"demo": settings}}}
    with pytest.raises(ConfigError, match=words) as refusal:
        planned(content, scale="none")
    if settings != {"epochs": 3}:
        assert f"{section}.{name}.scales.demo.{next(iter(settings))}" in str(refusal.value)
    if "smaller" not in settings:
        network = models.build("preactresnet18", num_classes=10, width=8, stem_stride=2, seed=0)
        budget = defences.Budget(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4), 10)
        with pytest.raises(ValueError, match=words):
            if section == "attacks":
                attacks.build(name, **settings)
            else:
                defences.purify(name, network, budget, np.random.default_rng(0), **settings)


@pytest.mark.parametrize(("change", "words"), [
    ({"rates": [0]}, "poisons none of"), ({"rates": [1e-6]}, "poisons none of"),
    ({"models": ["PreActResNet18"]}, "unknown model"),
    ({"attacks": ["Stripe"]}, "unknown attack"), ({"defences": ["FST"]}, "unknown defence"),
    ({"budgets": ["all"]}, "unknown budget"),
    ({"datasets": ["cifar11"]}, "unknown dataset"), ({"recipe": "f"}, "unknown recipe")])
def test_names_and_rates_are_checked_before_the_first_job(tmp_path, change, words):
    from cupel.experiment import Grid
    from cupel.settings import PAPERS, ConfigError

    (tmp_path / "fst").mkdir()
    (tmp_path / "shared").symlink_to(PAPERS / "shared")
    text = (PAPERS / "fst" / "experiment.yaml").read_text()
    (tmp_path / "fst" / "experiment.yaml").write_text(text)
    Grid(["fst"], "smoke", folder=tmp_path)
    import yaml

    content = yaml.safe_load(text)
    content["scales"]["smoke"]["blocks"][0] |= change
    (tmp_path / "fst" / "experiment.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=words):
        Grid(["fst"], "smoke", folder=tmp_path)
