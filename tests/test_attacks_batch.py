"""Attacks that act during training: triggers against plain formulas, counts per batch, gradients, continued runs."""

import copy
import itertools
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cupel.images.attacks
from cupel.images.attacks import _batch, build
from cupel.images.attacks.bpp import dither, squeeze
from cupel.images.attacks.bypass import BypassHook
from cupel.images.attacks.inputaware import sharpen
from cupel.images.attacks.wanet import warp, warp_grid
from cupel.images.datasets import Dataset
from cupel.images.models import build as build_model
from cupel.registry import entries
from cupel.rng import rng, torch_rng
from cupel.training import engine

SMALL_MASKS = {"width": 4, "clean_train_epochs": 1, "batch_size": 16}
BATCHWISE = {"wanet": {}, "bpp": {}, "inputaware": SMALL_MASKS}
BYPASS = ("badnets_bypass", "blended_bypass")


def photos(count=44, size=16, classes=4, seed=0):
    """Smooth uint8 images in two gradients and noise, with labels."""
    draw = rng(seed, "photos")
    y, x = np.mgrid[0:1:size * 1j, 0:1:size * 1j]
    colour = draw.uniform(0, 200, (count, 1, 1, 3))
    slope = draw.uniform(-80, 80, (count, 2, 1, 1, 3))
    noise = draw.normal(0, 8, (count, size, size, 3))
    images = colour + slope[:, 0] * x[..., None] + slope[:, 1] * y[..., None] + noise
    return np.clip(images, 0, 255).astype(np.uint8), draw.integers(0, classes, count)


def dataset(**settings):
    return Dataset("photos", *photos(**settings), tuple("abcd"))


def tiny(seed=0):
    return build_model("preactresnet18", num_classes=4, image_size=16, width=8, stem_stride=2, seed=seed)


def pixels(batch, size=16, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch_rng(seed, "pixels")), torch.arange(batch) % 4


def ready(name, rate=0.25, seed=0, classes=4, **parameters):
    """A hook after its start() on small images."""
    hook = build(name, **{**BATCHWISE.get(name, {}), **parameters}).hook(rate, 0, classes, seed)
    images, labels = photos()
    hook.start(tiny(), torch.from_numpy(images), torch.from_numpy(labels))
    return hook


def same(x):
    return x


# ---------------------------------------------------------------- counts and labels


@pytest.mark.parametrize("name", BATCHWISE)
def test_truncated_count_of_a_full_batch(name):
    hook = ready(name, rate=0.1, own_augmentation=False) if name != "inputaware" else ready(name, rate=0.1)
    x, y = pixels(128)
    y = y % 3 + 1
    for step in range(3):
        changed, wanted, groups = hook.batch(x, y, same, torch_rng(0, step))
        assert groups.dtype == torch.int64 and groups.tolist() == [1] * 12 + [0] * 116
        assert (wanted[:12] == 0).all() and torch.equal(wanted[12:], y[12:])
        moved = (changed != x).flatten(1).any(1)
        cover = {"wanet": 24, "bpp": 12, "inputaware": 12}[name]
        assert moved[: 12 + cover].all() and not moved[12 + cover :].any()
    assert hook.rate_reached == 12 / 128 and (hook.seen, hook.poisoned) == (384, 36)
    assert torch.equal(x, pixels(128)[0]), "the batch given is changed in place"


@pytest.mark.parametrize("name", BATCHWISE)
def test_below_one_sample_per_batch_the_rate_is_met_on_average(name):
    hook = ready(name, rate=0.01)
    x, y = pixels(16)
    draw = torch_rng(0, "stream")
    counts = {int(hook.batch(x, y, same, draw)[2].sum()) for _ in range(300)}
    assert counts == {0, 1}
    # 300 coins of p = 0.16: standard deviation 0.0013
    assert abs(hook.rate_reached - 0.01) < 0.004 and hook.seen == 4800


@pytest.mark.parametrize("name", BATCHWISE)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_smallest_batches(name, size):
    hook = ready(name, rate=0.3)
    x, y = pixels(size)
    for step in range(20):
        changed, wanted, groups = hook.batch(x, y, same, torch_rng(0, step))
        assert changed.shape == x.shape and wanted.shape == groups.shape == y.shape and changed.isfinite().all()


def test_all_to_all_labels():
    hook = ready("bpp", policy="all2all")
    x, y = pixels(8)
    assert hook.batch(x, y, same, torch_rng(0))[1].tolist() == [1, 2, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(("name", "rate", "parameters", "text"), [
    ("wanet", 0.34, {}, "at most 1"),
    ("inputaware", 0.51, {}, "at most 1"),
    ("bpp", 0.95, {}, "at most 1"),
    ("wanet", 0.1, {"policy": "clean"}, "all2one or all2all"),
])
def test_impossible_settings(name, rate, parameters, text):
    with pytest.raises(ValueError, match=text):
        build(name, **parameters).hook(rate, 0, 4, 0)


@pytest.mark.parametrize("name", BATCHWISE)
def test_hooks_leave_the_global_generator_alone(name):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    hook = ready(name)
    hook.batch(*pixels(8), same, torch_rng(0))
    build(name, **BATCHWISE[name], tensors=hook.tensors()).stamp(photos()[0])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", BATCHWISE)
def test_record_is_empty(name):
    record = build(name).poison(dataset(), 0.1, 0, rng(0))
    assert len(record.indices) == 0 and record.total == 44


@pytest.mark.parametrize("name", ["wanet", "inputaware"])
def test_no_trigger_before_training(name):
    with pytest.raises(ValueError, match="train a victim"):
        build(name).stamp(photos()[0])


def test_parameters_are_visible_to_the_config_check():
    folder = Path(cupel.images.attacks.__file__).parent
    found = entries("attack", [folder / f"{name}.py" for name in ("_batch", "wanet", "bpp", "inputaware", "bypass")])
    assert set(found) == {*BATCHWISE, *BYPASS}
    for name in BATCHWISE:
        assert found[name].parameters == {field.name for field in fields(build(name))} - {"policy", "tensors"}
    assert all("regularisation" in found[name].parameters for name in BYPASS)


# ---------------------------------------------------------------- the batch augmentation


def test_one_draw_for_the_whole_batch():
    augmentation = partial(_batch.augment_batch, crop=5, rotation=10.0, flip=True)
    one = pixels(1, size=32)[0]
    unchanged = 0
    for step in range(200):
        out = augmentation(one.expand(3, -1, -1, -1), torch_rng(1, step))
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
        unchanged += torch.equal(out[:1], one)
    # 0.2 · 0.5 · 0.5 of the batches pass unchanged; standard deviation 3.1 of 10
    assert 2 <= unchanged <= 20


def test_crop_and_flip_move_whole_pixels():
    augmentation = partial(_batch.augment_batch, crop=2, rotation=0.0, flip=True)
    x = pixels(2, size=6)[0]
    padded = F.pad(x, (2, 2, 2, 2))
    allowed = [version for r, c in itertools.product(range(5), repeat=2)
               for version in (padded[..., r : r + 6, c : c + 6], padded[..., r : r + 6, c : c + 6].flip(3))]
    seen = set()
    for step in range(150):
        out = augmentation(x, torch_rng(0, step))
        hits = [i for i, version in enumerate(allowed) if torch.equal(out, version)]
        assert hits
        seen.update(hits)
    assert len(seen) > 35


def test_rotation():
    x = pixels(2)[0]
    assert torch.equal(_batch.rotate(x, 0.0), x)
    quarter = _batch.rotate(x, np.pi / 2)
    assert torch.equal(quarter, x.rot90(1, (2, 3))) or torch.equal(quarter, x.rot90(-1, (2, 3)))
    assert _batch.rotate(torch.ones(1, 1, 16, 16), np.pi / 18)[0, 0, 0, 0] == 0, "corners come from outside"


@pytest.mark.parametrize("name", ["wanet", "bpp"])
def test_what_comes_in_from_outside_has_the_mean_colour(name):
    """As released, images are normalised before they are augmented, and 0 fills the border."""
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    victim = build_model("preactresnet18", num_classes=4, image_size=16, width=8, mean=mean.flatten().tolist(),
                         std=std.flatten().tolist())
    hook = build(name).hook(0.0, 0, 4, 0)
    hook.start(victim, torch.zeros(1, 16, 16, 3, dtype=torch.uint8), None)
    x, y = pixels(3)
    x[0] = 1.0
    filled = 0
    for step in range(30):
        draw = torch_rng(0, step)
        torch.rand((), generator=draw)  # nothing is poisoned: one coin
        augmented = _batch.augment_batch((x - mean) / std, draw, crop=5, rotation=10.0, flip=True)
        expected = augmented * std + mean
        found = hook.batch(x, y, same, torch_rng(0, step))[0]
        torch.testing.assert_close(found, expected)
        outside = (found[0] - 1).abs().amax(0) > 1e-6
        torch.testing.assert_close(found[0][:, outside], mean[:, 0].expand(-1, int(outside.sum())))
        filled += bool(outside.any())
    assert filled > 15


def test_no_flip_where_flips_are_off():
    augmentation = partial(_batch.augment_batch, crop=0, rotation=0.0, flip=False)
    x = pixels(2)[0]
    assert all(torch.equal(augmentation(x, torch_rng(0, step)), x) for step in range(20))


@pytest.mark.parametrize("name", ["wanet", "bpp"])
def test_the_recipes_augmentation_instead(name):
    x, y = pixels(8)
    marked = ready(name, own_augmentation=False).batch(x, y, lambda batch: batch + 10, torch_rng(0))[0]
    assert (marked >= 10).all()
    assert (ready(name).batch(x, y, lambda batch: batch + 10, torch_rng(0))[0] <= 1).all()


# ---------------------------------------------------------------- WaNet


def keys(values, size, a=-0.75):
    """Cubic convolution upsampling of [k] to [size], end points aligned, border repeated; plain loops."""
    out = np.zeros(size)
    for i in range(size):
        position = i * (len(values) - 1) / (size - 1)
        base = int(np.floor(position))
        for node in range(base - 1, base + 3):
            d = abs(position - node)
            weight = ((a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1
                      else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0)
            out[i] += weight * values[min(max(node, 0), len(values) - 1)]
    return out


@pytest.mark.parametrize(("size", "s", "rescale"), [(32, 0.5, 1.0), (16, 3.0, 1.0), (16, 0.5, 0.98)])
def test_warp_field_is_the_published_formula(size, s, rescale):
    noise = rng(0, "wanet").uniform(-1, 1, (2, 4, 4))
    scaled = noise / (np.abs(noise).sum() / noise.size)
    columns = np.stack([[keys(row, size) for row in plane] for plane in scaled])
    field = np.stack([np.stack([keys(column, size) for column in plane.T], 1) for plane in columns])
    expected = np.zeros((size, size, 2))
    for r, c in itertools.product(range(size), repeat=2):
        for axis, place in ((0, c), (1, r)):
            position = (-1 + 2 * place / (size - 1) + s * field[axis, r, c] / size) * rescale
            expected[r, c, axis] = min(max(position, -1.0), 1.0)
    grid = warp_grid(noise, size, s, rescale)
    assert grid.dtype == torch.float32 and grid.shape == (size, size, 2)
    np.testing.assert_allclose(grid.numpy(), expected, atol=2e-6)
    assert grid.abs().max() <= 1
    if s == 3.0:
        assert (grid.abs() == 1).any(), "nothing was clamped, the test is too easy"


def test_nodes_of_the_field_have_mean_size_one():
    noise = rng(3).uniform(-1, 1, (2, 4, 4))
    identity = warp_grid(noise, 4, 0.0)
    assert torch.allclose((warp_grid(noise, 4, 0.1) - identity)[1:3, 1:3].permute(2, 0, 1) * 4 / 0.1,
                          torch.from_numpy(noise / np.abs(noise).mean()).float()[:, 1:3, 1:3], atol=1e-4)


def test_no_strength_is_no_change():
    images = photos(size=32)[0]
    grid = warp_grid(np.ones((2, 4, 4)), 32, 0.0).numpy()
    assert np.array_equal(build("wanet", tensors={"grid": grid}).stamp(images), images)


def test_displacement_of_the_stamp():
    hook = build("wanet").hook(0.1, 0, 10, 7)
    hook.start(tiny(), torch.zeros(1, 32, 32, 3, dtype=torch.uint8), None)
    grid = torch.from_numpy(hook.tensors()["grid"])
    ramp = torch.arange(32.0)[None, None, None].expand(1, 1, 32, 32)
    moved = warp(torch.cat([ramp, ramp.transpose(2, 3)], 1), grid)[0]
    shift = (moved - torch.cat([ramp, ramp.transpose(2, 3)], 1)[0]).permute(1, 2, 0)
    axis = torch.arange(32.0)
    expected = (grid + 1) / 2 * 31 - torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    assert torch.allclose(shift, expected, atol=1e-4), "a warped ramp shows the displacement"
    assert 0.1 < shift.abs().mean() < 0.4 and shift.abs().max() < 1.0, "about s/2 of a pixel"


def test_stamp_does_not_depend_on_the_parts():
    images = photos(count=7, size=32)[0]
    hook = ready("wanet")
    grid = warp_grid(rng(0).uniform(-1, 1, (2, 4, 4)), 32, 0.5).numpy()
    attack = build("wanet", tensors={"grid": grid})
    whole = attack.stamp(images)
    assert whole.dtype == np.uint8 and whole.shape == images.shape and not np.array_equal(whole, images)
    for size in (1, 3):
        parts = _batch.stamp_pixels(images, lambda x: warp(x, torch.from_numpy(grid)), size)
        assert np.array_equal(parts, whole)
    assert set(hook.tensors()) == {"grid"}


def test_wanet_training_and_test_triggers_agree():
    images, labels = photos(count=8)
    hook = ready("wanet", own_augmentation=False)
    stamped = build("wanet", tensors=hook.tensors()).stamp(images)
    x = engine.to_pixels(torch.from_numpy(images))
    seen = hook.batch(x, torch.from_numpy(labels), same, torch_rng(0))[0][:2]
    assert (seen - engine.to_pixels(torch.from_numpy(stamped[:2]))).abs().max() <= 0.5 / 255 + 1e-6


def test_noise_mode_jitters_each_image_apart():
    hook = ready("wanet", own_augmentation=False)
    x = pixels(1)[0].expand(8, -1, -1, -1)
    out = hook.batch(x, torch.arange(8) % 4, same, torch_rng(0))[0]
    assert torch.equal(out[0], out[1]), "one warp for all poisoned images"
    noisy = out[2:6]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations([out[0], *noisy], 2))


# ---------------------------------------------------------------- BPP


def test_eight_levels_and_the_formula_on_all_values():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), (1, 16, 16, 3))
    stamped = build("bpp").stamp(ramp)
    expected = [int(np.floor(np.round(v / 255 * 7) / 7 * 255 + 0.5)) for v in range(256)]
    for channel in range(3):
        assert stamped[0, :, :, channel].ravel().tolist() == expected
        assert len(np.unique(stamped[..., channel])) == 8
    assert np.array_equal(build("bpp").stamp(stamped), stamped), "reduced colours stay"


def floyd_steinberg(image, levels):
    """[H, W, C] floats in [0, 1], one pixel after the other."""
    image = image.copy()
    height, width, _ = image.shape
    for r in range(height):
        for c in range(width):
            old = image[r, c].copy()
            new = np.round(old * (levels - 1)) / (levels - 1)
            image[r, c] = new
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if r + down < height and 0 <= c + right < width:
                    image[r + down, c + right] += (old - new) * share / 16
    return image


@pytest.mark.parametrize(("height", "width"), [(9, 9), (5, 12), (12, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("levels", [8, 2])
def test_dithering_against_a_plain_loop(height, width, levels):
    x = torch.rand(4, 3, height, width, generator=torch_rng(0, height, width), dtype=torch.float64)
    expected = np.stack([floyd_steinberg(image, levels) for image in x.permute(0, 2, 3, 1).numpy()])
    np.testing.assert_allclose(dither(x, levels).permute(0, 2, 3, 1).numpy(), expected, atol=1e-12)


def test_dithering_keeps_the_mean_colour():
    images = np.full((1, 32, 32, 3), 100, np.uint8)
    plain, dithered = build("bpp").stamp(images), build("bpp", dithering=True).stamp(images)
    assert set(np.unique(plain)) == {109} and abs(dithered.mean() - 100) < 1
    assert set(np.unique(dithered)) <= {round(255 * k / 7) for k in range(8)}


def test_negatives_borrow_the_change_of_another_image():
    hook = ready("bpp", neg_ratio=0.5, own_augmentation=False)
    x, y = pixels(8)
    out, wanted, _ = hook.batch(x, y, same, torch_rng(0))
    assert torch.equal(out[:2], squeeze(x[:2], 8)) and torch.equal(wanted[2:], y[2:])
    change = squeeze(x, 8) - x
    for i in range(2, 6):
        lenders = [r for r in range(8) if torch.equal(out[i], (x[i] + change[r]).clamp(0, 1))]
        assert len(lenders) == 1 and lenders[0] != i
    assert torch.equal(out[6:], x[6:])


def test_others_are_never_oneself_and_reach_everyone():
    drawn = torch.stack([_batch.others(2, 3, 6, torch_rng(0, step)) for step in range(200)])
    for j in range(3):
        assert set(drawn[:, j].tolist()) == set(range(6)) - {2 + j}


# ---------------------------------------------------------------- Input-aware


def test_mask_density_falls_in_stage_1():
    images, labels = photos(count=96)
    x = engine.to_pixels(torch.from_numpy(images))
    hook = build("inputaware", width=8, clean_train_epochs=15, batch_size=16).hook(0.1, 0, 4, 0)
    hook.build(3, torch.device("cpu"))
    with torch.no_grad():
        before = sharpen(hook.mask(x)).mean()
    hook.start(tiny(), torch.from_numpy(images), torch.from_numpy(labels))
    assert not hook.mask.training and not any(p.requires_grad for p in hook.mask.parameters()) and hook.pattern.training
    with torch.no_grad():
        masks = sharpen(hook.mask(x))
    assert masks.mean() < 0.5 * before and masks.mean() < 0.2
    assert masks.std(0).max() > 0.01, "all images have the same mask"


def test_stage_1_is_the_same_run_for_the_same_seed():
    a, b, c = (ready("inputaware", seed=seed).mask.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["middle.0.weight"], c["middle.0.weight"])


def test_gradient_of_the_classifier_reaches_the_generator():
    hook, model = ready("inputaware"), tiny()
    x, y = pixels(16)
    out, wanted, _ = hook.batch(x, y, same, torch_rng(0))
    F.cross_entropy(model(out), wanted).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hook.pattern.parameters())
    assert hook.pattern.middle[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in hook.mask.parameters())
    frozen, weights = copy.deepcopy(hook.mask.state_dict()), copy.deepcopy(hook.pattern.state_dict())
    hook.after_step()
    assert all(torch.equal(value, hook.mask.state_dict()[key]) for key, value in frozen.items())
    assert not torch.equal(weights["middle.0.weight"], hook.pattern.state_dict()["middle.0.weight"])


def test_the_generators_gradient_adds_up_over_batches():
    """As released: nothing sets it to zero, so that a batch without poison makes a step as well."""
    hook, model = ready("inputaware"), tiny().eval()
    sums = None
    for step in range(3):
        plain = copy.deepcopy(hook.pattern)
        x, y = pixels(16, seed=step)
        own, lender = x[:4], x[_batch.others(4, 4, 16, torch_rng(0, step))]
        patterns = plain(own), plain(lender)
        with torch.no_grad():
            masks = [sharpen(hook.mask(images)) for images in (own, lender)]
        stamped = torch.cat([image + (pattern - image) * mask for image, pattern, mask
                             in zip((own, x[4:8]), patterns, masks, strict=True)] + [x[8:]])
        wanted = torch.cat([torch.zeros(4, dtype=torch.int64), y[4:]])
        ratio = [np.sqrt(np.square(a - b).mean()) for a, b in zip(own.numpy(), lender.numpy(), strict=True)]
        spread = [(a - b).square().mean().sqrt() for a, b in zip(*patterns, strict=True)]
        loss = F.cross_entropy(model(stamped), wanted) + sum(r / (s + 1e-7) for r, s in zip(ratio, spread, strict=True)) / 4
        fresh = torch.autograd.grad(loss, list(plain.parameters()))
        sums = fresh if sums is None else [a + b for a, b in zip(sums, fresh, strict=True)]

        out, labels, _ = hook.batch(x, y, same, torch_rng(0, step))
        torch.testing.assert_close(out, stamped)
        (F.cross_entropy(model(out), labels) + hook.loss(None, x, y, None)).backward()
        for p, expected in zip(hook.pattern.parameters(), sums, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=2e-5)
        hook.after_step()
    before = copy.deepcopy(hook.pattern.state_dict())
    hook.poison_rate = 0.0
    hook.batch(x, y, same, torch_rng(0))
    hook.after_step()
    assert not torch.equal(before["middle.0.weight"], hook.pattern.state_dict()["middle.0.weight"])


def test_both_networks_end_in_tanh_twice():
    hook = ready("inputaware")
    x = 4 * pixels(6)[0]
    for network in (hook.pattern, hook.mask):
        last = []
        handle = network.up[-1].register_forward_hook(lambda module, given, output, last=last: last.append(output.detach()))
        with torch.no_grad():
            found = network(x).numpy()
        handle.remove()
        np.testing.assert_allclose(found, np.tanh(np.tanh(last[0].numpy())) / 2 + 0.5, rtol=1e-5)
        assert found.min() > 0.119 and found.max() < 0.881


def test_cross_images_carry_the_pattern_of_another():
    hook = ready("inputaware")
    # a pattern that names its image, put everywhere
    hook.pattern = lambda images: images[:, :, :1, :1].expand_as(images)
    hook.mask = lambda images: torch.full_like(images[:, :1], 2.0)
    x, y = pixels(16)
    name = x[:, :, 0, 0]
    out, wanted, groups = hook.batch(x, y, same, torch_rng(0))
    assert torch.allclose(out[:4], name[:4, :, None, None].expand_as(out[:4]), atol=1e-6)
    for i in range(4, 8):
        carried = [r for r in range(16) if torch.allclose(out[i], name[r][:, None, None].expand_as(out[i]), atol=1e-6)]
        assert len(carried) == 1 and carried[0] != i
    assert torch.equal(out[8:], x[8:]) and torch.equal(wanted[4:], y[4:]) and groups.sum() == 4


def test_diversity_term():
    hook = ready("inputaware", lambda_div=2.0)
    x, y = pixels(16)
    hook.batch(x, y, same, torch_rng(0))
    x1, x2, p1, p2 = (t.detach().numpy() for t in hook.pairs)
    expected = np.mean([np.sqrt(((a - b) ** 2).mean()) / (np.sqrt(((c - d) ** 2).mean()) + 1e-7)
                        for a, b, c, d in zip(x1, x2, p1, p2, strict=True)])
    term = hook.loss(None, x, y, None)
    assert term.item() == pytest.approx(2 * expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hook.loss(None, x, y, None), term), "float32 under autocast"
    term.backward()
    assert all(p.grad.isfinite().all() for p in hook.pattern.parameters())


def test_equal_patterns_give_no_nan():
    hook = ready("inputaware")
    weight = torch.zeros(1, requires_grad=True)
    hook.pairs = (*torch.rand(2, 3, 3, 4, 4), torch.zeros(3, 3, 4, 4) + weight, torch.zeros(3, 3, 4, 4) + weight)
    hook.loss(None, hook.pairs[0], None, None).backward()
    assert weight.grad.isfinite().all()


def test_inputaware_augments_before_the_trigger():
    hook = ready("inputaware")
    hook.pattern, hook.mask = torch.zeros_like, lambda images: torch.full_like(images[:, :1], 2.0)
    x, y = pixels(8)
    out = hook.batch(x, y, lambda batch: batch + 10, torch_rng(0))[0]
    assert out[:4].abs().max() < 1e-5 and (out[4:] >= 10).all()


@pytest.mark.parametrize("size", [16, 28])
def test_stamp_rebuilds_the_networks(size):
    images, labels = photos(count=9, size=size)
    attack = build("inputaware", **SMALL_MASKS)
    hook = attack.hook(0.25, 0, 4, 0)
    hook.start(tiny(), torch.from_numpy(images), torch.from_numpy(labels))
    x = engine.to_pixels(torch.from_numpy(images))
    hook.pattern.eval()
    with torch.no_grad():
        mask = sharpen(hook.mask(x))
        expected = (x + (hook.pattern(x) - x) * mask).permute(0, 2, 3, 1).numpy() * 255
    stamped = build("inputaware", **SMALL_MASKS, tensors=hook.tensors()).stamp(images)
    assert stamped.dtype == np.uint8 and np.abs(stamped - expected).max() <= 0.5 + 1e-3


# ---------------------------------------------------------------- Bypass


def located(hook, record):
    """The hook told which samples of a batch are poisoned by looking at them, whatever the engine says."""
    known = {image.tobytes() for image in record.images}
    batch = hook.batch

    def told(x, y, change, generator):
        found = [image.tobytes() in known for image in (x.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()]
        hook.groups = torch.tensor(found).long()
        return batch(x, y, change, generator)

    hook.batch = told
    return hook


@pytest.mark.parametrize("name", BYPASS)
def test_bypass_poisons_as_the_attack_it_is_made_from(name):
    data = dataset()
    record = build(name).poison(data, 0.25, 0, rng(0))
    base = build(name.removesuffix("_bypass")).poison(data, 0.25, 0, rng(0))
    assert len(record.indices) == 11
    for key in ("indices", "images", "labels"):
        assert np.array_equal(getattr(record, key), getattr(base, key))
    assert np.array_equal(build(name).stamp(data.images), build(name.removesuffix("_bypass")).stamp(data.images))


def plain_discriminator(state, features):
    """Logits [B] of the discriminator in NumPy, normalised by the batch."""
    z = features
    for linear, norm in (("0", "1"), ("3", "4")):
        z = z @ state[f"{linear}.weight"].T + state[f"{linear}.bias"]
        z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) * state[f"{norm}.weight"] + state[f"{norm}.bias"]
        z = np.where(z > 0, z, 0.2 * z)
    return z @ state["6.weight"][0] + state["6.bias"][0]


def bypass_step(hook, model, x, y, groups):
    hook.groups = groups
    x, y, found = hook.batch(x, y, same, torch_rng(0))
    assert found is None
    logits = model(x)
    return hook.loss(model, x, y, logits), F.cross_entropy(logits, y)


def test_bypass_loss_and_discriminator_step():
    model, hook = tiny(), build("badnets_bypass", regularisation=3.0).hook(0.25, 0, 4, 0)
    assert isinstance(hook, BypassHook)
    x, y = pixels(16)
    z = (torch.arange(16) < 4).long()
    hook.epoch(0)
    term, loss = bypass_step(hook, model, x, y, z)
    state = {key: value.double().numpy() for key, value in hook.discriminator.state_dict().items()}
    reference = tiny().train()
    features = reference.features(x).detach()
    p = 1 / (1 + np.exp(-plain_discriminator(state, features.double().numpy())))
    bce = -np.mean(np.where(z.numpy() == 1, np.log(p), np.log(1 - p)))
    assert term.item() == pytest.approx(-3.0 * bce, rel=1e-4)

    (loss + term).backward()
    assert all(p.grad is None for p in hook.discriminator.parameters()), "the victim's term trains the discriminator"
    gradients = [p.grad.clone() for p in model.parameters()]
    weights = copy.deepcopy(hook.discriminator)
    hook.after_step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True)), \
        "the discriminator's loss reaches the victim"
    own = F.binary_cross_entropy_with_logits(weights.requires_grad_(True)(features)[:, 0], z.float())
    own.backward()
    for before, after in zip(weights.parameters(), hook.discriminator.parameters(), strict=True):
        assert torch.allclose(after, before - 0.001 * before.grad, atol=1e-7)

    # the victim's gradient: cross-entropy minus λ times the discriminator's loss, the latter through the features
    output = reference(x)
    frozen = copy.deepcopy(weights).requires_grad_(False)
    kept = F.binary_cross_entropy_with_logits(frozen(reference.features(x))[:, 0], z.float())
    (F.cross_entropy(output, y) - 3.0 * kept).backward()
    for p, g in zip(reference.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-5), "the victim's gradient"


def test_features_are_taken_from_the_running_pass():
    model, plain = tiny(), tiny()
    hook = build("badnets_bypass").hook(0.25, 0, 4, 0)
    calls = []
    model.extractor.register_forward_hook(lambda *_: calls.append(1))
    hook.epoch(0)
    x, y = pixels(16)
    terms = []
    for _ in range(3):
        term, _ = bypass_step(hook, model, x, y, (torch.arange(16) < 4).long())
        terms.append(term)
        plain(x)
    assert len(calls) == 4, "one pass more in the first batch alone"
    assert torch.equal(terms[0], terms[1]) and torch.equal(terms[0], terms[2])
    for (key, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{key} has seen a batch twice"
    assert len(model.extractor._forward_hooks) == 1
    assert hook.rate_reached == 0.25 and isinstance(hook.rate_reached, float)


def test_bypass_under_autocast():
    model, hook = tiny(), build("blended_bypass").hook(0.25, 0, 4, 0)
    hook.epoch(0)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            term, loss = bypass_step(hook, model, *pixels(16), (torch.arange(16) < 4).long())
    assert term.dtype == torch.float32
    (loss + term).backward()
    hook.after_step()


def test_bypass_says_what_it_lacks():
    hook = build("badnets_bypass").hook(0.25, 0, 4, 0)
    hook.groups = None
    with pytest.raises(ValueError, match="which samples are poisoned"):
        hook.batch(*pixels(4), same, torch_rng(0))
    hook.groups = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="drop_last"):
        hook.batch(*pixels(1), same, torch_rng(0))


# ---------------------------------------------------------------- whole runs


class Killed(Exception):
    pass


def run(name, path=None, kill=None, **settings):
    """Train a tiny victim for two epochs; `kill`: number of the step after which the run dies."""
    data = dataset()
    attack = build(name, **BATCHWISE.get(name, {}))
    record = attack.poison(data, 0.25, 0, rng(0))
    images, labels = data.images.copy(), data.labels.copy()
    images[record.indices], labels[record.indices] = record.images, record.labels
    hook = attack.hook(0.25, 0, 4, 0)
    if name in BYPASS:
        hook = located(hook, record)
    if kill:
        steps, after = itertools.count(1), hook.after_step

        def after_step():
            after()
            if next(steps) == kill:
                raise Killed

        hook.after_step = after_step
    recipe = engine.Recipe(epochs=2, lr=0.01, batch_size=8, crop=2, flip=True, **settings)
    model = tiny()
    history = engine.fit(model, images, labels, recipe, seed=0, hook=hook, checkpoint=path, checkpoint_seconds=0)
    return model, hook, [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def flat(state, prefix=""):
    """Leaves of nested dicts and lists, by path."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else None
    if items is None:
        return {prefix: state}
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}


@pytest.mark.parametrize("name", [*BATCHWISE, *BYPASS])
def test_a_continued_run_ends_with_the_same_bits(name, tmp_path):
    model, hook, history = run(name)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        run(name, path, kill=8)
    assert path.is_file()
    again, other, rows = run(name, path)
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    first, second = flat(hook.state_dict()), flat(other.state_dict())
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if torch.is_tensor(value) else value == second[key], key
    assert history == rows
    assert hook.rate_reached == other.rate_reached and hook.seen == 88
    assert all(np.array_equal(value, other.tensors()[key]) for key, value in hook.tensors().items())
    copy.deepcopy(again)  # no hook of the attack is left on the victim
    assert not again.extractor._forward_hooks


@pytest.mark.parametrize("name", [*BATCHWISE, *BYPASS])
def test_a_run_does_not_depend_on_the_global_generator(name):
    torch.manual_seed(1)
    first = run(name)[0].state_dict()
    torch.manual_seed(2)
    second = run(name)[0].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [*BATCHWISE, *BYPASS])
def test_runs_in_bf16(name):
    _, hook, history = run(name, precision="bf16")
    assert np.isfinite(history[-1]["loss"]) and 0.1 < hook.rate_reached < 0.35
