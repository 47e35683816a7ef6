"""Proper Interpretability as a user runs it: grid, wrong settings, data, checkpoints, evaluations, report, end to end."""

import copy
import itertools
import json
import pickle
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from cupel import checkpoint
from cupel.evaluation.intervals import wilson
from cupel.experiment import SCALES
from cupel.files import read_json
from cupel.images import datasets
from cupel.images.datasets import restricted_imagenet
from cupel.reporting.tables import gather
from cupel.robust import aai, attacks, autoattack, measure, stages
from cupel.robust.evaluations import Subject, evaluation
from cupel.robust.models import NETWORKS, Chain, GapClassifier, build, initialise, load
from cupel.robust.objectives import METHODS
from cupel.settings import PAPERS, ConfigError, read_yaml, schema
from cupel.sources import NoSource
from cupel.training.engine import Recipe
from tests.conftest import planned
from tests.test_workflow import Folder, jobs

KEY = "proper_interpretability"
FILE = PAPERS / KEY / "experiment.yaml"
CLASSES = 4


@pytest.fixture(scope="module")
def experiment():
    return read_yaml(FILE)


def plan(experiment, scale="demo", seeds=None):
    return planned(experiment, scale, seeds=seeds)


def network(dataset="mnist", recipe="main", defence="int", model="small"):
    return {"dataset": dataset, "model": model, "recipe": recipe, "defence": defence, "seed": "0"}


def tiny(seed=0, colours=1):
    return initialise(GapClassifier(Chain(colours, [(3, 4, 2), (5, 3, 1)]), CLASSES), seed).eval()


def tiny_set(n=12, side=8, seed=0):
    draw = np.random.default_rng(seed)
    return datasets.Dataset("tiny", draw.integers(0, 256, (n, side, side, 1), np.uint8), draw.integers(0, CLASSES, n),
                            tuple("abcd"))


def subject(n=12, **settings):
    return Subject.make(tiny(), tiny_set(n), **{"train_eps": 0.1, "count": n, "batch_size": 5, **settings})


# ----------------------------------------------------------------------------------------------------------------- grid


def test_the_experiment_file_is_sound_at_every_scale(experiment):
    started = time.perf_counter()
    for scale in set(SCALES) & set(experiment["scales"]):
        cells = plan(experiment, scale).cells
        assert cells and len({tuple(sorted(cell.items())) for cell in cells}) == len(cells)
        assert all(isinstance(value, str) for cell in cells for value in cell.values())
        networks = {tuple(cell[k] for k in ("dataset", "model", "recipe", "defence", "seed"))
                    for cell in cells if cell["stage"] == "trained"}
        attacked = [tuple(cell[k] for k in ("dataset", "model", "recipe", "defence", "seed"))
                    for cell in cells if cell["stage"] == "attacked"]
        assert set(attacked) <= networks
    assert time.perf_counter() - started < 2
    demo = plan(experiment).cells
    assert [cell["defence"] for cell in demo if cell["stage"] == "trained"] == ["normal", "adv", "int", "int2"]
    assert {cell["seed"] for cell in plan(experiment, seeds=[3, 4]).cells} == {"3", "4"}


def test_desk_keeps_the_published_eps_attack_and_points(experiment):
    grid = plan(experiment, "desk")
    trained = {(cell["defence"], cell["seed"]) for cell in grid.cells if cell["stage"] == "trained"}
    methods = {"normal", "adv", "trades", "intone", "int", "intadv", "int2", "int2adv"}
    assert trained == set(itertools.product(methods, "012"))
    settings = grid.training(network())["settings"]
    inner, training = settings["inner"], settings["training"]
    assert inner["eps"] == 0.3 and training["batch_size"] == 50 and "train_size" not in settings
    assert inner["steps"] * inner["step_size"] >= inner["eps"]
    assert inner["ramp"][1] < training["epochs"] * 55_000 // training["batch_size"]  # most of the training is at the full ε
    found = grid.evaluation({**network(), "evaluation": "sweep"})
    assert found["points"]["count"] == 200 and found["pgd"]["steps"][-1] == found["aai"]["steps"] == 200
    assert 0.3 in found["pgd"]["eps"] and max(found["pgd"]["eps"]) > 0.3
    assert {cell["defence"] for cell in grid.cells if cell["attack"] == "isa_maps"} == {"normal", "int"}


def test_names_in_the_schema_are_those_of_the_library():
    form = schema("robust")
    assert set(form["sections"]["defences"]["properties"]["function"]["enum"]) == set(METHODS)
    block = form["block"]["properties"]
    assert set(block["models"]["items"]["enum"]) == set(NETWORKS)
    assert set(block["datasets"]["items"]["enum"]) <= set(datasets.NAMES)


def test_schedules_are_those_of_the_released_code(experiment):
    """proper_interpretability SPEC 6, as steps of the optimiser."""
    known = plan(experiment, "paper")
    for dataset, images, epochs, per_epoch in (("mnist", 55_000, 100, 1_100), ("cifar10", 45_000, 200, 351)):
        spec = known.training(network(dataset))
        assert images // spec["settings"]["training"]["batch_size"] == per_epoch
        recipe = stages.make_recipe(spec["settings"]["training"], per_epoch)
        assert (recipe.epochs, recipe.optimizer, recipe.weight_decay) == (epochs, "adam", 0)
        assert (recipe.crop, recipe.flip, recipe.drop_last) == (0, False, True)
        if dataset == "mnist":
            assert recipe.schedule == "constant" and recipe.lr == 1e-4
        else:
            assert recipe.schedule == "multistep" and recipe.lr == 1e-3 and recipe.gamma == Recipe(1, 1.0).gamma == 0.1
            assert all(abs(epoch * per_epoch - step) <= per_epoch / 2
                       for epoch, step in zip(recipe.milestones, (40_000, 60_000), strict=True))
    ramp = stages.make_objective(known.training(network()), 1100).ramp
    assert [ramp(step) for step in (0, 2000, 6000, 10_000, 10**5)] == pytest.approx([0, 0, 0.15, 0.3, 0.3])
    timing = stages.make_objective(known.training(network("cifar10", "timing")), 351)
    assert timing.ramp(0) == pytest.approx(8 / 255) and timing.step_size == pytest.approx(2 / 255)


@pytest.mark.parametrize("change, message", [
    (lambda e: e["scales"]["demo"]["blocks"][0]["evaluations"].append("sweeep"), "did you mean 'sweep'"),
    (lambda e: e["evaluations"]["sweep"]["settings"].update(pdg={}), "unknown evaluation 'pdg'"),
    (lambda e: e["evaluations"]["sweep"]["settings"]["pgd"].update(step=1), "unknown parameter 'step'.*did you mean 'steps'"),
    (lambda e: e["evaluations"]["sweep"]["datasets"]["mnist"]["pgd"].update(eps=[0, "8/0"]), "eps.1: '8/0' is not a number"),
    (lambda e: e["defences"]["adv"].update(settings={"weight": 0.1}), "defences.adv.settings.weight.*no penalty"),
    (lambda e: e["scales"]["demo"]["blocks"][0]["evaluations"].append("unforeseen"), "take colour images"),
    (lambda e: e["recipes"]["main"]["datasets"]["mnist"]["inner"].update(ramp=[5, 4]), "begins at step 5, after its end 4"),
    (lambda e: e["recipes"]["main"]["datasets"]["mnist"]["inner"].update(eps="ε"), "inner.eps: 'ε' is not a number"),
])
def test_wrong_settings_name_file_key_and_what_is_allowed(experiment, change, message):
    wrong = copy.deepcopy(experiment)
    wrong["recipes"]["main"]["scales"] = {}  # its demo overlay would hide a change in the ramp
    change(wrong)
    with pytest.raises(ConfigError, match=rf"experiment.yaml.*{message}"):
        plan(wrong)


@pytest.mark.parametrize("change, message", [
    (lambda e: e["recipes"]["main"]["settings"].update(valdation=3), "recipes.main.settings.*did you mean 'validation'"),
    (lambda e: e["defences"]["int"].update(function="inti"), "defences.int.function: 'inti' is not allowed"),
    (lambda e: e["defences"]["int"].update(settings={"gamma": 1}), "defences.int.settings"),
    (lambda e: e["scales"]["demo"]["blocks"][0].update(models=["smalll"]), "'smalll' is not allowed"),
    (lambda e: e["recipes"]["main"]["datasets"]["mnist"]["training"].update(lr=0), "out of range"),
])
def test_schema_refuses_typos(experiment, change, message):
    wrong = copy.deepcopy(experiment)
    change(wrong)
    with pytest.raises(ConfigError, match=message):
        plan(wrong)


# -------------------------------------------------------------------------------------------------- Restricted ImageNet


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory, mirror):
    """Pictures of the Imagenette excerpt in the form of ImageNet: 1000 synset folders, pictures in those of nine classes."""
    root = tmp_path_factory.mktemp("mirror") / "imagenet"
    names = [f"n{k:08d}" for k in range(1000)]
    for part in ("train", "val"):
        for name in names:
            (root / part / name).mkdir(parents=True)
    with zipfile.ZipFile(mirror / "imagenette" / "imagenette_excerpt_224.zip") as pack:
        members = [name for name in pack.namelist() if name.endswith(".JPEG")]
        synsets = sorted({name.split("/")[2] for name in members})
        for c, (first, last) in enumerate(restricted_imagenet.RANGES.values()):
            for part, count in (("train", 4), ("val", 2)):
                chosen = [name for name in members if name.split("/")[1:3] == [part, synsets[c]]][:count]
                for j, name in enumerate(chosen):
                    folder = root / part / names[last if j % 2 else first]
                    (folder / f"p{j}.JPEG").write_bytes(pack.read(name))
        (root / "train" / names[0] / "tench.JPEG").write_bytes(pack.read(members[0]))  # of no class
    return root


def test_restricted_imagenet_from_a_folder(tmp_path, imagenet):
    manifest = datasets.prepare(datasets.describe("restricted_imagenet"), tmp_path / "out", kinds=("mirror",),
                                mirror=imagenet.parent)
    assert manifest["counts"] == {"train": [4] * 9, "test": [2] * 9} and manifest["classes"][0] == "dog"
    train = datasets.load(tmp_path / "out", "train")
    assert isinstance(train.images, np.memmap) and train.images.shape == (36, 224, 224, 3) and train.images.dtype == np.uint8
    # files of a class are ordered by synset and name; the excerpt's pictures are 224x224 and must come through untouched
    with Image.open(imagenet / "train" / "n00000030" / "p0.JPEG") as picture:
        assert np.array_equal(train.images[np.flatnonzero(train.labels == 2)[0]], np.asarray(picture.convert("RGB")))
    again = datasets.prepare(datasets.describe("restricted_imagenet"), tmp_path / "again", kinds=("mirror",), mirror=imagenet)
    assert again["content_sha256"] == manifest["content_sha256"]  # the folder itself may be the mirror


def test_a_missing_or_odd_imagenet_is_explained(tmp_path, imagenet):
    with pytest.raises(NoSource, match=r"neither .*imagenet nor .* is a folder with train and val"):
        datasets.prepare(datasets.describe("restricted_imagenet"), tmp_path / "out", kinds=("mirror",), mirror=tmp_path)
    odd = tmp_path / "odd" / "imagenet"
    for k in range(1000):
        (odd / "train" / f"n{k:08d}").mkdir(parents=True)
    (odd / "val").mkdir()
    with pytest.raises(ValueError, match="no pictures of dog, cat"):
        restricted_imagenet.read_folder([odd])
    for k in (151, 281, 30, 33, 80, 365, 389, 118, 300):
        (odd / "train" / f"n{k:08d}" / "a.JPEG").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="must first be sorted into folders val/<wnid>"):
        restricted_imagenet.read_folder([odd])
    with pytest.raises(ValueError, match=r"a\.JPEG is not readable as a picture"):
        restricted_imagenet.pictures([odd / "train" / "n00000151" / "a.JPEG"]).fill(np.zeros((1, 224, 224, 3), np.uint8))


def test_pictures_are_squeezed_without_smoothing():
    values = np.random.default_rng(0).integers(0, 256, (300, 500, 3)).astype(np.uint8)
    found = restricted_imagenet.squeeze(Image.fromarray(values))
    rows, columns = ((np.arange(224) + 0.5) * size / 224 - 0.5 for size in (300, 500))
    for i, j in ((0, 0), (223, 223), (100, 17)):
        y, x = np.clip(rows[i], 0, 299), np.clip(columns[j], 0, 499)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, 299), min(x0 + 1, 499)
        top = values[y0, x0] * (1 - x + x0) + values[y0, x1] * (x - x0)
        bottom = values[y1, x0] * (1 - x + x0) + values[y1, x1] * (x - x0)
        assert np.abs(found[i, j] - (top * (1 - y + y0) + bottom * (y - y0))).max() <= 0.51
    grey = restricted_imagenet.squeeze(Image.fromarray(values[..., 0]))
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()
    alpha = np.concatenate([values, np.zeros((300, 500, 1), np.uint8)], 2)
    assert np.array_equal(restricted_imagenet.squeeze(Image.fromarray(alpha, "RGBA")), found)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name, colours, classes", [("small", 1, 10), ("pool", 1, 10), ("wresnet", 3, 9)])
def test_networks_come_back_bit_for_bit(tmp_path, name, colours, classes):
    model = build(name, num_classes=classes, in_channels=colours, seed=5)
    checkpoint.save(model.to(memory_format=torch.channels_last), tmp_path / "model.safetensors")
    state = torch.random.get_rng_state()
    found = load(tmp_path / "model.safetensors")
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(found) is GapClassifier and found.spec == model.spec
    for (key, value), (other, expected) in zip(found.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other and torch.equal(value, expected)
    checkpoint.save(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="no spec"):
        checkpoint.save(tiny(), path)
    model = build("small", in_channels=1)
    model.spec = {**model.spec, "name": "pool"}
    checkpoint.save(model, path)
    with pytest.raises(checkpoint.NotACheckpoint, match="does not fit the model 'pool'"):
        load(path)
    model.spec = {**model.spec, "name": "smal"}
    checkpoint.save(model, path)
    with pytest.raises(checkpoint.NotACheckpoint, match="did you mean 'small'"):
        load(path)


# ---------------------------------------------------------------------------------------------------------- AutoAttack


def trained():
    """A network that is right on its images and has something to lose, the images, their labels."""
    draw = np.random.default_rng(3)
    x = torch.from_numpy(draw.random((16, 1, 8, 8))).float()
    y = torch.from_numpy(draw.integers(0, CLASSES, 16))
    model = tiny(3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.requires_grad_(False)
    assert (model(x).argmax(1) == y).float().mean() > 0.8
    return model, x, y


def test_stronger_attacks_find_at_least_what_pgd_finds_and_stay_in_the_ball():
    model, x, y = trained()
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    options = {"eps": 0.1, "seed": 0, "iterations": 15, "queries": 30}
    found = autoattack.attack(model, x, y, **options)
    assert np.array_equal(np.random.get_state()[1], state) and list(found) == ["apgd_ce", "apgd_dlr", "square"]
    right = [(model(z).argmax(1) == y) for z in (x, *found.values())]
    assert all((after <= before).all() for before, after in itertools.pairwise(right))
    plain = model(attacks.snapshots(model, x, y, eps=0.1, steps=(15,))[15]).argmax(1) == y
    assert right[1].sum() <= plain.sum() < right[0].sum()
    assert all((z - x).abs().max() <= 0.1 + 1e-6 and z.min() >= 0 and z.max() <= 1 for z in found.values())
    assert torch.equal(found["apgd_dlr"][~right[1]], found["apgd_ce"][~right[1]])  # what fell is left alone
    again = autoattack.attack(model, x, y, **options)
    assert all(torch.equal(again[name], z) for name, z in found.items())
    with pytest.raises(ValueError, match="unknown attack 'fab'"):
        autoattack.attack(model, x, y, eps=0.1, seed=0, attacks=("fab",))


# ---------------------------------------------------------------------------------------------------------- evaluations


def rows_of(found):
    return {(row["attack"], row["attack_variant"], row["metric"]): row for row in found.rows}


def test_sweep_equals_separate_attacks():
    it = subject()
    rows = rows_of(evaluation["pgd"](it, eps=[0, 0.1, 0.2, "51/255"], steps=[1, 4], step_size=0.05))
    clean = (it.model(it.x).argmax(1) == it.y).double().mean().item()
    assert rows["pgd", "eps=0", "ata"]["value"] == pytest.approx(clean) and ("pgd", "eps=0 steps=1", "ata") not in rows
    for text, eps in (("0.1", 0.1), ("0.2", 0.2), ("51/255", 0.2)):
        for steps in (1, 4):
            z = attacks.snapshots(it.model, it.x, it.y, eps=eps, steps=(steps,), step_size=0.05)[steps]
            row = rows["pgd", f"eps={text} steps={steps}", "ata"]
            assert row["value"] == pytest.approx((it.model(z).argmax(1) == it.y).double().mean().item()) and row["n"] == 12
            assert (row["low"], row["high"]) == wilson(round(row["value"] * 12), 12)
    assert rows["pgd", "", "ata_train"]["value"] == rows["pgd", "eps=0.1 steps=4", "ata"]["value"]
    assert rows["pgd", "", "ata_beyond"]["value"] == pytest.approx(rows["pgd", "eps=0.2 steps=4", "ata"]["value"])


def test_points_are_the_published_ones_whatever_the_batch():
    labels = np.arange(60) % 10
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    test = datasets.Dataset("d", images, labels, tuple("0123456789"))
    made = Subject.make(tiny(), test, train_eps=0.1, count=20, batch_size=7)
    state = np.random.RandomState(99)
    index = state.permutation(60)[:20]
    assert np.array_equal(made.y.numpy(), labels[index])
    assert np.array_equal(made.target.numpy(), (labels[index] + 1 + state.randint(9, size=20)) % 10)
    assert np.allclose(made.x[:, 0].numpy(), test.images[index][..., 0] / 255)
    assert np.array_equal(made.draw().uniform(size=3), state.uniform(size=3))
    assert np.array_equal(made.draw().uniform(size=3), made.draw().uniform(size=3))  # each ε sees the same noise


def test_tau_bound_and_sneaking_rows():
    it = subject()
    found = evaluation["aai"](it, eps=[0.1], k=3, steps=3)
    rows = rows_of(found)
    taus = found.arrays["tau"][0]
    assert rows["aai", "eps=0.1", "tau"]["value"] == pytest.approx(np.nanmean(taus))
    assert rows["aai", "eps=0.1", "kept"]["value"] == pytest.approx(np.isfinite(taus).mean())
    found = evaluation["bound"](it, count=12)
    used = found.arrays["used"]
    if used.any():
        assert rows_of(found)["least_eps", "", "bound_violated"]["value"] == 0
        ratio = found.arrays["apart"][used] / found.arrays["bound"][used]
        assert rows_of(found)["least_eps", "", "bound_ratio"]["value"] == pytest.approx(np.median(ratio))
        assert ratio.min() > 0.999
    found = evaluation["isa"](subject(4), multipliers=[1.5], kinds=["cam", "repr"], norms=["l1"], scopes=["one", "two"])
    assert {name.rsplit("_", 1)[0] for name in found.arrays} == {"cam_l1_one", "cam_l1_two", "repr_l1_one"}
    assert ("isa", "repr l1", "isa_kept") in rows_of(found)


def test_restarts_and_art_are_rows_of_their_own():
    it = subject(6)
    rows = rows_of(evaluation["restarts"](it, eps=[0.1], steps=2, restarts=2))
    assert list(rows) == [("pgd_restarts", "eps=0.1 steps=2 restarts=2", "ata")]
    rows = rows_of(evaluation["autoattack"](it, eps=[0.1], attacks=["apgd_ce"], iterations=2))
    assert list(rows) == [("autoattack", "eps=0.1 to=apgd_ce", "ata")]


def test_pictures_have_their_arrays():
    it = subject(6)
    found = evaluation["gallery"](it, eps=0.1, count=2, steps=2).arrays
    assert found["images"].shape == (3, 2, 1, 8, 8) and found["maps"].shape == (3, 2, 2, 4, 4)
    assert found["cams"].shape == (6, 4, 4) and np.array_equal(found["images"][0], it.x[:2].numpy())
    assert np.abs(found["images"][1] - found["images"][0]).max() <= 0.1 + 1e-6
    found = evaluation["features"](it, count=3, steps=2).arrays
    assert found["filters"].shape == (3, 1, 4, 4) and found["reached"].shape == (3, 1, 8, 8)
    assert np.array_equal(found["neurons"], it.model.head.weight[:3].detach().numpy().argmax(1))


def test_overlap_by_hand():
    first = np.array([[[4.0, 3, 2, 1]], [[1, 2, 3, 4]]])
    second = np.array([[[4.0, 1, 3, 2]], [[4, 3, 2, 1]]])
    assert aai.overlap(first, second, k=2).tolist() == [0.5, 0.0]
    assert aai.overlap(first, first, k=2).tolist() == [1.0, 1.0]


def test_a_killed_evaluation_goes_on_after_its_last_part(tmp_path, monkeypatch):
    settings = {"points": {"count": 6, "batch_size": 6}, "pgd": {"eps": [0, 0.1], "steps": [1]}, "bound": {"count": 6}}
    spec, calls = {"settings": settings, "train_eps": 0.1, "seed": 0}, []

    def spied(kind):
        original = evaluation[kind]

        def run(*arguments, **parameters):
            calls.append(kind)
            if kind == "bound" and len(calls) == 2:
                raise KeyboardInterrupt
            return original(*arguments, **parameters)

        monkeypatch.setitem(evaluation, kind, run)

    spied("pgd"), spied("bound")
    with pytest.raises(KeyboardInterrupt):
        measure.evaluate(tiny(), tiny_set(), spec, tmp_path, "cpu")
    again = measure.evaluate(tiny(), tiny_set(), spec, tmp_path, "cpu")
    assert calls == ["pgd", "bound", "bound"]
    whole = measure.evaluate(tiny(), tiny_set(), spec, tmp_path / "other", "cpu")
    assert again[0] == whole[0]
    assert all(np.array_equal(again[1][key], value, equal_nan=True) for key, value in whole[1].items())


# --------------------------------------------------------------------------------------------------------------- stages


def outputs(folder, *names):
    endings = {"model": "model.safetensors", "history": "history.csv", "metrics": "metrics.json", "arrays": "evaluation.npz"}
    return {name: str(folder / endings[name]) for name in names}


def small_spec(experiment, method="int", **training):
    spec = plan(experiment, "smoke").training(network(defence=method))
    spec["settings"]["training"] = {**spec["settings"]["training"], **training}
    return spec


def test_a_network_is_trained_measured_and_repeats(tmp_path, mnist, experiment):
    spec = small_spec(experiment, epochs=1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        stages.train_network(spec, str(mnist.parent), outputs(tmp_path / name, "model", "history", "metrics"), "cpu")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    record = read_json(tmp_path / "a/metrics.json")
    assert record["status"] == "ok" and record["defence"] == "int" and record["train_samples"] == 200 and record["steps"] == 4
    assert {row["metric"] for row in record["rows"]} == {"acc", "seconds_per_epoch"}
    settings = {"points": {"count": 4}, "pgd": {"eps": [0, 0.3], "steps": [1]}}
    network = measure.Network(str(mnist.parent), str(tmp_path / "a/model.safetensors"), str(tmp_path / "a/metrics.json"))
    measure.attack_network(spec, settings, network, outputs(tmp_path, "arrays", "metrics"), "cpu")
    table = gather([{"paper": KEY, "folder": str(tmp_path)}])
    assert set(table.metric) == {"ata", "ata_train"} and set(table.stage) == {"attacked"} and set(table.defence) == {"int"}


def test_the_first_images_are_left_out_and_classes_keep_their_shares():
    data = tiny_set(80)
    left = stages.training_set(data, {"validation": 30}, 0)
    assert np.array_equal(left.images, data.images[30:])
    part = stages.training_set(data, {"validation": 30, "train_size": 20}, 0)
    assert len(part) == 20 and {image.tobytes() for image in part.images} <= {image.tobytes() for image in data.images[30:]}
    shares = np.bincount(left.labels, minlength=CLASSES) * 20 / 50
    assert (np.abs(np.bincount(part.labels, minlength=CLASSES) - shares) < 1).all()


def test_a_network_that_diverges_is_a_failed_cell_and_so_is_what_follows(tmp_path, mnist, experiment):
    spec = small_spec(experiment, lr=1e20)
    stages.train_network(spec, str(mnist.parent), outputs(tmp_path, "model", "history", "metrics"), "cpu")
    record = read_json(tmp_path / "metrics.json")
    assert record["status"] == "failed" and "Diverged" in record["reason"]
    (tmp_path / "sweep").mkdir()
    network = measure.Network(str(mnist.parent), str(tmp_path / "model.safetensors"), str(tmp_path / "metrics.json"))
    measure.attack_network(spec, {"points": {"count": 4}, "pgd": {"eps": [0]}}, network,
                           outputs(tmp_path / "sweep", "arrays", "metrics"), "cpu")
    assert "its victim failed: Diverged" in read_json(tmp_path / "sweep" / "metrics.json")["reason"]
    table = gather([{"paper": KEY, "folder": str(path)} for path in (tmp_path, tmp_path / "sweep")])
    assert table.metric.tolist() == ["acc", "ata"] and (table.status == "failed").all()


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mnist):
    folder = Folder(tmp_path_factory.mktemp("run"), mnist.parents[1].resolve())
    folder.set(papers=[KEY])
    code, output = folder.run()
    assert code == 0, output[-4000:]
    return folder


@pytest.mark.slow
def test_smoke_ends_with_the_report(finished):
    results = finished.path / "results" / "smoke"
    cells = pd.read_parquet(results / "cells.parquet")
    assert set(cells.status) == {"ok"} and set(cells.defence) == {"normal", "int"}
    assert set(cells.stage) == {"trained", "attacked"}
    assert {"acc", "ata", "ata_train", "ata_beyond", "tau", "seconds_per_epoch"} <= set(cells.metric)
    assert {"pgd", "aai", "isa", "pgd_restarts", "autoattack"} <= set(cells.attack)
    folder = results / "papers" / KEY
    for name in ("report.html", "card.md", "claims.csv", "tables/ata_mnist_small.csv", "tables/stronger_mnist_small.tex",
                 "figures/maps1_mnist_small.svg", "figures/neurons_mnist_small.svg"):
        assert (folder / name).stat().st_size > 0
    page = (results / "papers" / "proper_interpretability" / "report.html").read_text()
    assert "Proper Network Interpretability" in page and "class activation maps before and under attack" in page
    assert not list(results.rglob("checkpoint.*"))
    made = json.loads((results / "provenance.json").read_text())
    assert list(made["data"]) == ["images/mnist"]


@pytest.mark.slow
def test_changes_rerun_what_depends_on_them_only(finished):
    code, output = finished.run("-n")
    assert code == 0 and "Nothing to be done" in output, output[-3000:]
    file = "workflow/cupel/robust/evaluations.py"
    finished.edit(file, "model = model.to(device, memory_format=torch.channels_last).eval()", "model = model.to(device).eval()")
    planned = jobs(finished.run("-n")[1])
    finished.edit(file, "model = model.to(device).eval()", "model = model.to(device, memory_format=torch.channels_last).eval()")
    assert planned["attack_network"] == 6 and "train_robust" not in planned
    file = f"workflow/papers/{KEY}/experiment.yaml"
    finished.edit(file, 'γ 0.01", settings: {weight: 0.01}}', 'γ 0.01", settings: {weight: 0.02}}')
    planned = jobs(finished.run("-n")[1])
    finished.edit(file, 'γ 0.01", settings: {weight: 0.02}}', 'γ 0.01", settings: {weight: 0.01}}')
    assert planned["train_robust"] == 1 and planned["attack_network"] == 3


@pytest.mark.slow
def test_wrong_settings_end_the_run_before_its_first_job(finished):
    file = f"workflow/papers/{KEY}/experiment.yaml"
    finished.edit(file, "defences: [normal, int], evaluations", "defences: [normal, itn], evaluations")
    code, output = finished.run("-n")
    finished.edit(file, "defences: [normal, itn], evaluations", "defences: [normal, int], evaluations")
    assert code != 0 and "unknown defence 'itn'" in output and "did you mean 'int'" in output and "Traceback" not in output


@pytest.mark.slow
def test_released_weights(finished, tmp_path):
    code, output = finished.run("released_weights")
    assert code != 0 and "released_weights is not set" in output
    for method, seed in (("normal", 1), ("int", 2)):
        model = build("small", in_channels=1, seed=seed)
        layers = [(layer.weight.detach().permute(2, 3, 1, 0).contiguous().numpy(), layer.bias.detach().numpy())
                  for layer in model.extractor.convs] + [(model.head.weight.detach().numpy().T[None, None].copy(),)]
        (tmp_path / f"mnist_smallgap_{method}_100.pkl").write_bytes(pickle.dumps(layers, 3))
    file = finished.path / "workflow" / "papers" / KEY / "experiment.yaml"
    before = file.read_text()
    content = yaml.safe_load(before)
    content["evaluations"]["released"]["settings"] = {"points": {"count": 4, "seed": 99, "batch_size": 4},
                                                      "pgd": {"steps": [1, 2]}, "aai": {"steps": 2}}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    try:
        code, output = finished.run("released_weights", "--config", f"released_weights={tmp_path}")
    finally:
        file.write_text(before)
    assert code == 0, output[-4000:]
    table = pd.read_csv(finished.path / "results/smoke/robust/released_weights/table.csv", index_col=0)
    assert table.index.tolist() == ["Normal", "Int"] and table.shape[1] == 13
