"""SIG, LF, TrojanNN, LC and SSBA: the arithmetic of the stamp, and what preparation must achieve."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cupel.images.attacks import ImpossibleRate, build
from cupel.images.attacks.lc import LEFT_BLOCK, corner_pattern
from cupel.images.attacks.lf import low_pass, targeted_deepfool
from cupel.images.attacks.trojannn import apple
from cupel.images.datasets import Dataset
from cupel.images.models import build as build_model
from cupel.rng import rng
from cupel.training.engine import Recipe, fit, predict

TARGET = 0
MIRROR = Path(os.environ.get("CUPEL_MIRROR") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toy():
    """Four classes of coloured gratings with noise: 32×32, learnt within seconds, fooled by small perturbations."""
    draw = rng(0, "toy")
    labels = np.repeat(np.arange(4), 100)
    y, x = np.mgrid[:32, :32] / 32
    plans = np.stack([np.sin(2 * np.pi * (u * x + v * y)) for u, v in ((2, 0), (0, 2), (2, 2), (1, -2))])[..., None]
    colours = draw.normal(size=(4, 1, 1, 3))
    images = 128 + 25 * (plans * colours)[labels] + 25 * draw.normal(size=(400, 32, 32, 3))
    return Dataset("toy", np.clip(images, 0, 255).astype(np.uint8), labels, ("a", "b", "c", "d"))


@pytest.fixture(scope="module")
def clean(toy):
    """A network trained on the toy data."""
    model = build_model("preactresnet18", num_classes=4, width=8, stem_stride=2, mean=[0.5] * 3, std=[0.2] * 3, seed=0)
    fit(model, toy.images, toy.labels, Recipe(epochs=4, lr=0.05, batch_size=50, crop=0, flip=False), seed=0)
    assert (predict(model, toy.images).argmax(1) == toy.labels).mean() > 0.95
    return model


def trigger_file(*parts):
    path = MIRROR.joinpath("triggers", *parts)
    if not path.is_file():
        pytest.skip(f"released trigger {path} is not here (set CUPEL_MIRROR to the folder that has triggers/)")
    return str(path)


def prepared(name, dataset, model, *, smaller=1.0, seed=0, **parameters):
    attack = build(name, **parameters)
    before = torch.get_rng_state()
    tensors = attack.prepare(dataset, model, TARGET, seed, smaller=smaller)
    assert all(isinstance(value, (np.ndarray, np.generic)) for value in tensors.values())
    return replace(attack, tensors=tensors), before


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


# ---------------------------------------------------------------- SIG


@pytest.mark.parametrize("size", [28, 32, 64])
def test_sig_is_the_formula(size):
    images = rng(0, "sig").integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    stamped = build("sig").stamp(images)
    assert stamped.dtype == np.uint8 and stamped.shape == images.shape
    for j in range(size):
        exact = np.clip(images[:, :, j].astype(np.float64) + 40 * math.sin(2 * math.pi * 6 * j / size), 0, 255)
        # truncation: at most one grey level below, and never above but for the rounding of the sum
        below = exact - stamped[:, :, j]
        assert below.min() > -1e-4 and below.max() < 1, j
    still = build("sig").stamp(np.full((1, 32, 32, 1), 100, np.uint8))[0, 0, :, 0]
    assert still[0] == still[16] == 100, "columns where the sine is zero keep their value"
    assert still[4] == 60 and still[12] == 140, "sin(3π/2) and sin(9π/2)"


def test_sig_policies(toy):
    draw = lambda: rng(1, "poison")  # noqa: E731
    clean_label = build("sig")
    assert clean_label.policy == "clean"
    record = clean_label.poison(toy, 0.2, TARGET, draw())
    assert len(record.indices) == 80 and (record.labels == TARGET).all() and (record.original == TARGET).all()
    with pytest.raises(ImpossibleRate, match=r"needs 160 images of class 0, which has 100 .*possible rate is 0\.25"):
        clean_label.poison(toy, 0.4, TARGET, draw())
    assert clean_label.poison(toy, 0.25, TARGET, draw()).rate_reached == 0.25

    capped = build("sig", sig_policy="capped").poison(toy, 0.4, TARGET, draw())
    assert capped.rate_reached == 0.25 and capped.poison_rate == 0.4 and (capped.original == TARGET).all()
    possible = build("sig", sig_policy="capped").poison(toy, 0.2, TARGET, draw())
    np.testing.assert_array_equal(possible.indices, record.indices)

    dirty = build("sig", sig_policy="dirty_label").poison(toy, 0.4, TARGET, draw())
    assert dirty.rate_reached == 0.4 and (dirty.labels == TARGET).all() and len(set(dirty.original)) == 4
    np.testing.assert_array_equal(dirty.images, clean_label.stamp(toy.images[dirty.indices]))


def test_sig_survives_replacement_and_refuses_contradictions():
    for policy in ("clean_label", "dirty_label", "capped"):
        attack = build("sig", sig_policy=policy)
        assert replace(attack, tensors={}) == attack
    with pytest.raises(ValueError, match="are clean_label, dirty_label, capped"):
        build("sig", sig_policy="dirty")
    with pytest.raises(ValueError, match="keeps labels"):
        build("sig", policy="all2all")
    with pytest.raises(ValueError, match="relabels"):
        build("sig", policy="clean", sig_policy="dirty_label")


# ---------------------------------------------------------------- LF


def test_low_pass_is_a_gaussian_with_zero_padding():
    impulse = torch.zeros(1, 2, 41, 41)
    impulse[:, :, 20, 20] = 1
    out = low_pass(impulse, 30, 6.0)
    weight = [math.exp(-0.5 * ((k - 14.5) / 6) ** 2) for k in range(30)]
    weight = np.array(weight) / sum(weight)
    # 14 zeros before and 15 after: the response to the impulse spreads from 20 − 15 to 20 + 14
    np.testing.assert_allclose(out[0, 1, 5:35, 5:35], np.outer(weight, weight), atol=1e-6)
    assert out.sum().item() == pytest.approx(2, rel=1e-5)


def test_deepfool_reaches_the_target_of_a_linear_network_in_one_step():
    linear = torch.nn.Linear(12, 3)
    network = torch.nn.Sequential(torch.nn.Flatten(), linear)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(3, 12, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    label = network(x).argmax(1)
    change = targeted_deepfool(network, x, 2, 50, 0.02)
    assert (network(x + change).argmax(1) == 2).all()
    assert (change[label == 2] == 0).all()
    logits = network(x)
    for i in torch.nonzero(label != 2)[:, 0]:
        normal = linear.weight[label[i]] - linear.weight[2]
        distance = (logits[i, label[i]] - logits[i, 2]) / normal.norm()
        # two classes apart from the target may need a second hyperplane, never a shorter way
        assert change[i].norm() >= 1.02 * distance - 1e-5
    assert (targeted_deepfool(network, x, 2, 0, 0.02) == 0).all(), "images not brought there count for nothing"


def test_lf_pattern_is_smooth_in_range_and_fools(toy, clean):
    attack, state = prepared("lf", toy, clean, smaller=0.2)
    pattern = attack.tensors["pattern"]
    assert pattern.dtype == np.uint8 and pattern.shape == (32, 32, 3)
    assert pattern.min() == 0 and pattern.max() == 51
    spectrum = np.abs(np.fft.fft2(pattern - pattern.mean((0, 1)), axes=(0, 1))) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32) * 32, np.fft.fftfreq(32) * 32))
    assert spectrum[frequency > 4].sum() / spectrum.sum() < 0.1
    assert attack.tensors["fooling_rate"] >= 0.2, "this easy network is fooled within the passes"
    stamped = attack.stamp(toy.images[:7])
    np.testing.assert_array_equal(stamped, np.minimum(toy.images[:7].astype(int) + pattern, 255))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(prepared("lf", toy, clean, smaller=0.2)[0].tensors, attack.tensors)
    assert not np.array_equal(prepared("lf", toy, clean, smaller=0.2, seed=1)[0].tensors["pattern"], pattern)


def test_lf_needs_a_network_or_a_file(tmp_path, toy):
    path = tmp_path / "v.npy"
    np.save(path, np.full((1, 32, 32, 3), 0.1, np.float32))
    assert build("lf").needs == "clean_model" and build("lf", pattern=str(path)).needs == ""
    with pytest.raises(ValueError, match="prepare"):
        build("lf").stamp(toy.images[:1])
    from_file = build("lf", pattern=str(path))
    tensors = from_file.prepare(toy, None, 0, 0)
    assert_same(tensors, {"pattern": np.full((32, 32, 3), np.float32(0.1) * np.float32(255))})
    np.testing.assert_array_equal(replace(from_file, tensors=tensors).stamp(toy.images), from_file.stamp(toy.images))
    with pytest.raises(ValueError, match=r"\(32, 32, 3\), not \(28, 28, 1\)"):
        from_file.stamp(np.zeros((1, 28, 28, 1), np.uint8))


def test_lf_without_effect_is_an_error_unless_asked_for(tmp_path, toy):
    path = tmp_path / "v.npy"
    np.save(path, np.full((32, 32, 3), 0.003, np.float32))
    with pytest.raises(ValueError, match="changes no pixel"):
        build("lf", pattern=str(path)).stamp(toy.images[:1])
    np.testing.assert_array_equal(build("lf", pattern=str(path), scaled=False).stamp(toy.images[:5]), toy.images[:5])


def test_lf_released_files():
    images = rng(0, "lf").integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    path = trigger_file("lowFrequency", "cifar10_preactresnet18_0_255.npy")
    np.testing.assert_array_equal(build("lf", pattern=path).stamp(images),
                                  np.minimum(images.astype(int) + np.load(path), 255))
    path = trigger_file("lowFrequency", "cifar10_vgg19_bn_0_255.npy")
    np.testing.assert_array_equal(build("lf", pattern=path, scaled=False).stamp(images), images)
    repaired = build("lf", pattern=path).stamp(np.zeros_like(images))
    assert repaired.max() in (50, 51) and (repaired > 0).mean() > 0.5


# ---------------------------------------------------------------- TrojanNN


def test_apple_is_where_the_released_one_is():
    rows, columns = np.nonzero(apple(32))
    assert len(rows) == 118
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 29, 17, 28)
    assert apple(64).sum() == pytest.approx(4 * 118, rel=0.05) and apple(224).any()


def test_trojannn_excites_the_best_connected_features(toy, clean):
    attack, state = prepared("trojannn", toy, clean, smaller=0.1)
    tensors = attack.tensors
    strength = clean.head.weight.detach().abs().sum(0).numpy()
    assert set(tensors["neurons"]) == set(np.argsort(strength)[-2:])
    trigger = tensors["trigger"]
    assert trigger.dtype == np.uint8 and (trigger[~apple(32)] == 0).all()
    assert trigger[apple(32)].min() >= round(0.7 * 255) - 1, "within eps of white"
    loss = [np.square(tensors[key] - 100).sum() for key in ("activations_before", "activations")]
    assert loss[1] < loss[0] and tensors["activations"].mean() > tensors["activations_before"].mean()
    pixels = torch.from_numpy(trigger).permute(2, 0, 1)[None] / 255
    found = clean.features(pixels)[0, tensors["neurons"]].detach().numpy()
    np.testing.assert_allclose(found, tensors["activations"], rtol=0.05, atol=0.02)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(prepared("trojannn", toy, clean, smaller=0.1)[0].tensors, tensors)


def test_trojannn_clips_or_wraps():
    trigger = np.full((2, 2, 1), 200, np.uint8)
    images = np.array([[10, 55], [56, 255]], np.uint8).reshape(1, 2, 2, 1)
    attack = build("trojannn")
    with pytest.raises(ValueError, match="prepare"):
        attack.stamp(images)
    assert replace(attack, tensors={"trigger": trigger}).stamp(images).ravel().tolist() == [210, 255, 255, 255]
    wrapped = replace(build("trojannn", wrap=True), tensors={"trigger": trigger}).stamp(images)
    assert wrapped.dtype == np.uint8 and wrapped.ravel().tolist() == [210, 255, 0, 199]


def test_trojannn_may_skip_the_normalisation(toy, clean):
    tensors = prepared("trojannn", toy, clean, smaller=0.1, normalised=False)[0].tensors
    shown = torch.from_numpy(tensors["trigger"]).permute(2, 0, 1)[None] / 255
    found = clean.extractor(shown)[0, tensors["neurons"]].detach().numpy()
    np.testing.assert_allclose(found, tensors["activations"], rtol=0.05, atol=0.02)
    white = clean.extractor(torch.from_numpy(apple(32).astype(np.float32)).expand(1, 3, 32, 32))[0, tensors["neurons"]]
    np.testing.assert_allclose(white.detach().numpy(), tensors["activations_before"], rtol=1e-4, atol=1e-5)


def test_trojannn_released_mask(toy, clean):
    path = trigger_file("trojannn", "apple4.png")
    mask = build("trojannn", mask=path).start(32, 3)
    rows, columns, _ = np.nonzero(mask)
    assert (mask.max(-1) > 0).sum() == 117
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 29, 17, 28)
    trigger = prepared("trojannn", toy, clean, smaller=0.01, mask=path)[0].tensors["trigger"]
    assert (trigger[mask == 0] == 0).all() and np.abs(trigger / 255 - mask).max() <= 0.3 + 1 / 255


# ---------------------------------------------------------------- LC


def loss_of(model, images):
    logits = torch.from_numpy(predict(model, images))
    return F.cross_entropy(logits, torch.full((len(images),), TARGET)).item()


@pytest.mark.parametrize("eps", [8, 16])
def test_lc_images_are_hard_and_near(toy, clean, eps):
    attack, state = prepared("lc", toy, clean, smaller=0.1, eps=eps)
    indices, images = attack.tensors["indices"], attack.tensors["images"]
    np.testing.assert_array_equal(indices, np.flatnonzero(toy.labels == TARGET))
    assert images.dtype == np.uint8
    difference = np.abs(images.astype(int) - toy.images[indices])
    assert difference.max() == eps
    assert loss_of(clean, images) > loss_of(clean, toy.images[indices]) + 0.5
    assert attack.tensors["accuracy"] < attack.tensors["accuracy_before"]
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(prepared("lc", toy, clean, smaller=0.1, eps=eps)[0].tensors, attack.tensors)


def test_lc_corners_and_labels(toy, clean):
    attack, _ = prepared("lc", toy, clean, smaller=0.01)
    record = attack.poison(toy, 0.1, TARGET, rng(0, "poison"))
    assert len(record.indices) == 40 and record.rate_reached == 0.1
    assert (record.original == TARGET).all() and (record.labels == TARGET).all()
    corners = corner_pattern(32) != 0
    assert corners.sum() == 36
    hard = attack.tensors["images"][np.searchsorted(attack.tensors["indices"], record.indices)]
    np.testing.assert_array_equal(record.images[:, ~corners], hard[:, ~corners])
    white, black = corner_pattern(32) == 1, corner_pattern(32) == -1
    assert (record.images[:, white] == 255).all() and (record.images[:, black] == 0).all()

    stamped, wanted, true = attack.test_set(toy, TARGET)
    others = toy.labels != TARGET
    assert (wanted == TARGET).all() and (true == toy.labels[others]).all()
    np.testing.assert_array_equal(stamped[:, ~corners], toy.images[others][:, ~corners])
    assert (stamped[:, white] == 255).all() and (stamped[:, black] == 0).all()

    with pytest.raises(ImpossibleRate, match=r"possible rate is 0\.25"):
        attack.poison(toy, 0.5, TARGET, rng(0, "poison"))
    with pytest.raises(ValueError, match="another target"):
        attack.poison(toy, 0.1, 1, rng(0, "poison"))
    with pytest.raises(ValueError, match="prepare"):
        build("lc").poison(toy, 0.1, TARGET, rng(0, "poison"))
    with pytest.raises(ValueError, match="policy is clean"):
        build("lc", policy="all2one")


def test_lc_pattern_of_other_sizes_and_amplitudes():
    for corner in (slice(0, 3), slice(29, 32)):
        np.testing.assert_array_equal(corner_pattern(32)[corner, :3], LEFT_BLOCK)
        np.testing.assert_array_equal(corner_pattern(32)[corner, 29:], LEFT_BLOCK[:, ::-1])
    np.testing.assert_array_equal(corner_pattern(64), np.kron(corner_pattern(32), np.ones((2, 2))))
    np.testing.assert_array_equal(corner_pattern(28)[-3:, -3:], LEFT_BLOCK[:, ::-1])
    grey = build("lc", amplitude=0.2).stamp(np.full((1, 32, 32, 3), 100, np.uint8))
    assert sorted(set(grey.ravel().tolist())) == [49, 100, 151]


def test_lc_with_an_adversarially_trained_network(toy, clean):
    before = {name: value.clone() for name, value in clean.state_dict().items()}
    tensors = prepared("lc", toy, clean, smaller=0.1, robust_epochs=10, robust_steps=1)[0].tensors
    for name, value in clean.state_dict().items():
        assert torch.equal(value, before[name]), "the network given is not changed"
    assert np.abs(tensors["images"].astype(int) - toy.images[tensors["indices"]]).max() <= 8
    assert not np.array_equal(tensors["images"], prepared("lc", toy, clean, smaller=0.1)[0].tensors["images"])


# ---------------------------------------------------------------- SSBA

QUICK = {"bits": 4, "width": 8, "batch_size": 16, "lr": 2e-3, "epochs": 120}


@pytest.fixture(scope="module")
def ssba(toy):
    return prepared("ssba", toy, None, smaller=0.1, **QUICK)


def test_ssba_hides_bits_that_can_be_read(toy, ssba):
    attack, state = ssba
    # 300 steps, seconds on one core. Chance is 0.5.
    assert attack.tensors["bit_accuracy"] > 0.9
    assert attack.tensors["psnr"] > 18
    assert attack.tensors["fingerprint"].shape == (4,) and set(attack.tensors["fingerprint"]) <= {0, 1}
    assert torch.equal(torch.get_rng_state(), state)


def test_ssba_stamps_from_its_tensors_alone(toy, ssba, tmp_path):
    attack, _ = ssba
    np.savez(tmp_path / "trigger.npz", **attack.tensors)
    with np.load(tmp_path / "trigger.npz", allow_pickle=False) as file:
        again = replace(build("ssba", **QUICK), tensors=dict(file))
    images = toy.images[::8]
    state = torch.get_rng_state()
    stamped = again.stamp(images)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(stamped, attack.stamp(images))
    assert stamped.dtype == np.uint8 and stamped.shape == images.shape and (stamped != images).any()
    error = np.square(stamped.astype(float) - images).mean()
    assert 10 * math.log10(255**2 / error) == pytest.approx(float(attack.tensors["psnr"]), abs=1)
    with pytest.raises(ValueError, match="prepare"):
        build("ssba").stamp(images)


def test_ssba_is_deterministic_in_its_seed(toy):
    few = toy.take(np.arange(0, 400, 4))
    quick = {**QUICK, "epochs": 2, "fidelity": 0.0}
    first = prepared("ssba", few, None, **quick)[0].tensors
    assert_same(first, prepared("ssba", few, None, **quick)[0].tensors)
    fingerprints = {tuple(rng(seed, "ssba", "fingerprint").integers(0, 2, 100)) for seed in range(5)}
    assert len(fingerprints) == 5


@pytest.mark.parametrize("size, channels", [(28, 1), (64, 3), (224, 3)])
def test_ssba_takes_other_sizes(size, channels):
    images = rng(0, "sizes").integers(0, 256, (4, size, size, channels), dtype=np.uint8)
    dataset = Dataset("sizes", images, np.arange(4), ("a", "b", "c", "d"))
    # no fidelity is asked for, so the two steps count as a finished training
    attack, _ = prepared("ssba", dataset, None, bits=3, width=4, epochs=2, fidelity=0.0)
    assert attack.stamp(images).shape == images.shape


def test_ssba_too_short_is_an_error(toy):
    with pytest.raises(ValueError, match=r"1 steps are too few for 100 bits: the decoder read at most \d+% of the"):
        build("ssba", width=4).prepare(toy, None, TARGET, 0, smaller=0.01)
