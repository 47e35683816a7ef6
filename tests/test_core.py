"""Streams, files, splits, triggers, records."""

import shlex

import numpy as np
import pytest
from PIL import Image

from cupel import files, prepared
from cupel.images import attacks, datasets
from cupel.images.attacks.base import ImpossibleRate, PoisonRecord, choose, relabel
from cupel.images.datasets import Dataset, splits
from cupel.rng import derive, rng


def toy(n=200, size=32, classes=10):
    draw = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return Dataset("toy", draw.integers(0, 256, (n, size, size, 3), np.uint8), labels.astype(np.int64),
                   tuple(map(str, range(classes))))


def test_streams_are_independent_and_repeatable():
    assert rng(1, "a").random() == rng(1, "a").random()
    assert len({rng(s, n).random() for s in (0, 1) for n in ("a", "b", "a/b")}) == 6
    assert derive(3, "x") == derive(3, "x") < 2**63


def test_atomic_leaves_nothing_behind(tmp_path):
    target = tmp_path / "out.txt"
    with pytest.raises(RuntimeError), files.atomic(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    files.write_text(target, "whole")
    assert target.read_text() == "whole" and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_not_prepared_is_made_by_the_command_printed(tmp_path):
    folder = tmp_path / "data set; echo"
    with pytest.raises(FileNotFoundError) as said:
        prepared.opened(folder)
    command = str(said.value).partition("make it with: ")[2]
    assert shlex.split(command) == ["snakemake", "--cores", "1", f"{folder}/manifest.json"]
    prepared.finish(prepared.begin(folder), {})
    assert prepared.opened(folder) == folder


def test_cifar10_is_the_real_one(cifar10):
    """Order of labels as on the official site (first ten of each split), counts, and pixels equal to the manifest."""
    train, test = (datasets.load(cifar10, split) for split in ("train", "test"))
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert isinstance(train.images, np.memmap) and train.images.dtype == np.uint8
    means = np.asarray(train.images[::25], np.float64).mean((0, 1, 2)) / 255
    assert np.abs(means - [0.4914, 0.4822, 0.4465]).max() < 0.01


def test_hold_out_is_disjoint_and_balanced(cifar10):
    labels = datasets.load(cifar10, "train").labels
    parts = splits.split(labels, held_out=0.02, train_size=None, seed=0)
    assert len(parts.held_out) == 1000 and len(parts.train) == 49_000
    assert not set(parts.held_out) & set(parts.train)
    assert np.bincount(labels[parts.held_out]).tolist() == [100] * 10
    # "first": the earliest images of every class
    for c in range(10):
        assert parts.held_out[labels[parts.held_out] == c].max() == np.flatnonzero(labels == c)[99]
    drawn = splits.split(labels, held_out=0.02, train_size=5000, seed=0, order="random")
    assert len(drawn.train) == 5000 and not set(drawn.held_out) & set(drawn.train)
    assert set(np.bincount(labels[drawn.train]).tolist()) <= {497, 498, 499, 500, 501, 502, 503}
    kept = splits.split(labels, held_out=0.02, train_size=None, seed=0, remove=False)
    assert len(kept.train) == 50_000


def test_samples_per_class_are_nested():
    labels = np.repeat(np.arange(4), 30)
    small, large = (splits.per_class(labels, np.arange(120), spc, 7) for spc in (2, 10))
    assert np.bincount(labels[small]).tolist() == [2] * 4 and set(small) <= set(large)
    with pytest.raises(ValueError, match="spc ≤ 30"):
        splits.per_class(labels, np.arange(120), 31, 0)


def test_badnets_changes_exactly_the_corner():
    images = toy().images
    stamped = attacks.build("badnets").stamp(images)
    mask = np.zeros((32, 32), bool)
    mask[29:32, 29:32] = True
    assert (stamped[:, mask] == 255).all() and (stamped[:, ~mask] == images[:, ~mask]).all()
    grid = attacks.build("badnets", pattern="checkerboard").stamp(images)[0, 29:, 29:, 0]
    assert grid.tolist() == [[255, 1, 255], [1, 255, 1], [255, 1, 255]]
    large = attacks.build("badnets").stamp(np.zeros((1, 64, 64, 3), np.uint8))
    assert (large[0, ..., 0] == 255).sum() == 36


def test_badnets_equals_the_released_files(mirror):
    """The released patches, put in where the file is above zero, give the same images."""
    images = toy(20).images
    for name, pattern in (("trigger_image", "white"), ("trigger_image_grid", "checkerboard")):
        file = np.asarray(Image.open(mirror / "triggers" / "badnet" / f"{name}.png").convert("RGB"))
        expected = np.where(file > 0, file, images)
        assert (attacks.build("badnets", pattern=pattern).stamp(images) == expected).all()


def test_blended_is_the_stated_mixture(mirror):
    images = toy().images
    attack = attacks.build("blended")
    picture = attack.pattern(32, 3)
    exact = 0.8 * images.astype(np.float64) + 0.2 * picture
    difference = exact - attack.stamp(images)
    assert difference.min() > -1e-4 and difference.max() < 1.0001  # truncated, never rounded up
    released = attacks.build("blended", picture=str(mirror / "triggers" / "blended" / "hello_kitty.jpeg"))
    assert released.pattern(32, 3).shape == (32, 32, 3) and (released.pattern(32, 3) != picture).any()
    assert attacks.build("blended").stamp(np.zeros((2, 28, 28, 1), np.uint8)).shape == (2, 28, 28, 1)


def test_poison_record(tmp_path):
    data = toy(1000)
    record = attacks.build("badnets").poison(data, 0.05, 0, rng(0, "poison"))
    assert len(record.indices) == 50 and record.rate_reached == 0.05 and (np.diff(record.indices) > 0).all()
    assert (record.labels == 0).all() and (record.original == data.labels[record.indices]).all()
    assert (record.original == 0).any()  # dirty-label sampling does not leave out the target class
    record.save(tmp_path / "r.npz")
    again = PoisonRecord.load(tmp_path / "r.npz")
    assert again.rate_reached == record.rate_reached and (again.images == record.images).all() and again.target == 0


def test_clean_label_limit():
    labels = np.repeat(np.arange(10), 100)
    with pytest.raises(ImpossibleRate, match=r"the largest possible rate is 0\.1"):
        choose(labels, 0.2, 0, "clean", rng(0))
    assert (labels[choose(labels, 0.1, 3, "clean", rng(0))] == 3).all()


def test_label_policies():
    labels = np.array([0, 1, 9])
    assert relabel(labels, 2, "all2one", 10).tolist() == [2, 2, 2]
    assert relabel(labels, 2, "all2all", 10).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="all2one, all2all, clean"):
        relabel(labels, 2, "some", 10)


def test_asr_denominator_leaves_out_the_target_class():
    data = toy(1000)
    stamped, wanted, true = attacks.build("badnets").test_set(data, 3)
    assert len(stamped) == 900 and 3 not in true and (wanted == 3).all()
    stamped, wanted, true = attacks.build("badnets", policy="all2all").test_set(data, 3)
    assert len(stamped) == 1000 and (wanted == (true + 1) % 10).all()


def test_unknown_names_are_explained():
    with pytest.raises(ValueError, match="did you mean 'badnets'"):
        attacks.build("badnet")
    with pytest.raises(ValueError, match=r"attack badnets.*parameters are"):
        attacks.build("badnets", sise=4)
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        datasets.describe("cifar")
