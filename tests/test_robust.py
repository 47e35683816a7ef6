"""Interpretability: SAME padding by hand, completeness, the bound on random networks, objectives and attacks afresh."""

import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from scipy.stats import kendalltau

from cupel.rng import torch_rng
from cupel.robust import aai, attacks, isa, objectives, released, unforeseen
from cupel.robust.discrepancy import classes_of, discrepancy, lower_bound, tightness
from cupel.robust.maps import integrated_gradients, interpret
from cupel.robust.models import Chain, GapClassifier, Residual, SameConv2d, build, initialise, pad_same, same_padding
from cupel.training.engine import Recipe, fit

CLASSES = 4


def tiny(seed=0, colours=1):
    return initialise(GapClassifier(Chain(colours, [(3, 4, 2), (5, 3, 1)]), CLASSES), seed).double()


def batch(n=3, side=8, colours=1, seed=0):
    draw = np.random.default_rng(seed)
    x = torch.from_numpy(draw.random((n, colours, side, side)))
    return x, torch.from_numpy(draw.integers(0, CLASSES, n))


# ------------------------------------------------------------------------------------------------------------- networks


def test_same_padding_by_hand():
    # 3 rows, stride 2, on 4: the windows are rows 0-2 and rows 2-4, and row 4 is padding
    assert same_padding(4, 3, 2) == (0, 1)
    assert [same_padding(28, k, s) for k, s in ((4, 2), (7, 1), (5, 1), (3, 1))] == [(1, 1), (3, 3), (2, 2), (1, 1)]
    assert same_padding(7, 3, 2) == (1, 1) and same_padding(3, 1, 2) == (0, 0)
    conv = SameConv2d(1, 1, 3, 2)
    with torch.no_grad():
        conv.weight.fill_(1), conv.bias.fill_(10)
        assert conv(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[19, 16], [16, 14]]
    # the padding of a maximum must not win over negative entries
    assert F.max_pool2d(pad_same(-torch.ones(1, 1, 3, 3), 2, 2, -torch.inf), 2)[0, 0].tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("name, colours, classes, side, parameters, shape", [
    ("small", 1, 10, 28, 166_396, (100, 7, 7)),
    ("small", 3, 10, 32, 166_908, (100, 8, 8)),
    ("pool", 1, 10, 28, 52_736, (64, 7, 7)),
    ("wresnet", 3, 10, 32, 463_008, (64, 8, 8)),
    ("wresnet", 3, 9, 64, 462_944, (64, 16, 16)),
])
def test_sizes_of_the_networks(name, colours, classes, side, parameters, shape):
    before = torch.random.get_rng_state()
    model = build(name, num_classes=classes, in_channels=colours)
    assert torch.equal(before, torch.random.get_rng_state())
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.rand(2, colours, side, side, generator=torch.Generator().manual_seed(0))
    features = model.feature_map(model.hidden(x))
    assert features.shape == (2, *shape) and (features < 0).any()
    assert (model.class_maps(model.hidden(x)).mean((2, 3)) - model(x)).abs().max() < 1e-5
    assert model.head.bias is None


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "height", "width"), [(7, 7, 7), (4, 8, 8), (3, 5, 8), (5, 3, 4), (1, 6, 6)])
def test_mean_and_mixture_of_a_convolution_are_those_of_its_output(kernel, height, width, stride):
    draw = torch.Generator().manual_seed(0)
    layer = SameConv2d(3, 5, kernel, stride).double()
    x, weight = (torch.randn(shape, generator=draw, dtype=torch.double) for shape in ((2, 3, height, width), (4, 5)))
    torch.testing.assert_close(layer.mean(x), layer(x).mean((2, 3)))
    torch.testing.assert_close(layer.mixed(x, weight), torch.einsum("kd,bdij->bkij", weight, layer(x)))


def test_a_network_that_was_tested_first_can_be_trained():
    model, (x, y) = tiny(), batch(side=9)  # a size that no other test has made known
    with torch.inference_mode():
        model(x)
    F.cross_entropy(model(x), y).backward()


def test_residual_network_equals_its_description():
    model = initialise(GapClassifier(Residual(3, (2, 4, 8), depth=2), CLASSES), 1).double()
    x, _ = batch(2, 8, 3)
    h = F.conv2d(x, model.extractor.conv.weight, model.extractor.conv.bias, padding=1)
    for number, block in enumerate(model.extractor.blocks):
        a, b = block.conv_a, block.conv_b
        if number in (2, 4):
            u = F.conv2d(F.pad(h.relu(), (0, 1, 0, 1)), a.weight, a.bias, stride=2)
            extra = h.shape[1] // 2
            zero = torch.zeros(2, extra, *u.shape[2:])
            side = torch.cat([zero, F.avg_pool2d(h, 2), zero], 1)
        else:
            u, side = F.conv2d(h.relu(), a.weight, a.bias, padding=1), h
        h = F.conv2d(u.relu(), b.weight, b.bias, padding=1) + side
    assert torch.allclose(model.feature_map(model.hidden(x)), h)
    assert torch.allclose(model(x), h.mean((2, 3)) @ model.head.weight.T)


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="did you mean 'small'"):
        build("smal")
    with pytest.raises(TypeError, match="divide uint8"):
        tiny()(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    x, y = batch()
    with pytest.raises(ValueError, match="unknown map 'camm'"):
        interpret(tiny(), x, y[:, None], "camm")


# ----------------------------------------------------------------------------------------------------------------- maps


def test_gradient_maps_equal_their_definitions():
    model, (x, y) = tiny(), batch()
    features = model.feature_map(model.hidden(x)).detach().requires_grad_()
    logits = model.head(features.mean((2, 3)))
    for c in range(CLASSES):
        (slope,) = torch.autograd.grad(logits[:, c].sum(), features, retain_graph=True)
        weighted = (slope.mean((2, 3), keepdim=True) * features).sum(1) * features[0, 0].numel()
        wanted = torch.full_like(y[:, None], c)
        assert torch.allclose(interpret(model, x, wanted)[:, 0], weighted)
        positive = (slope.clamp(min=0) * features).sum(1) * features[0, 0].numel()
        assert torch.allclose(interpret(model, x, wanted, "gradcam++")[:, 0], positive)


def test_integrated_gradients_equal_the_plain_sum():
    model, (x, _) = tiny(colours=2), batch(colours=2)
    classes = torch.tensor([[0, 3], [1, 1], [2, 0]])
    found = integrated_gradients(model, x, classes, points=7)
    for i, row in enumerate(classes.tolist()):
        for s, c in enumerate(row):
            total = 0
            for k in range(1, 8):
                z = (x[i : i + 1] * k / 7).requires_grad_()
                total = total + torch.autograd.grad(model(z, F.softplus)[0, c], z)[0][0]
            assert torch.allclose(found[i, s], x[i] * total / 7)


def test_integrated_gradients_can_be_differentiated():
    model, (x, y) = tiny(), batch(1, 4)
    assert torch.autograd.gradcheck(
        lambda z: integrated_gradients(model, z, y[:, None], points=2, differentiable=True), x.requires_grad_())


# ---------------------------------------------------------------------------------------------------------- discrepancy


def test_discrepancies_equal_numpy():
    a, b = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 2, 4, 4)))
    na, nb = a.numpy().reshape(3, 2, -1), b.numpy().reshape(3, 2, -1)
    width = na.max(2) - na.min(2)
    l1, l2 = np.abs(na - nb).sum(2), np.sqrt(((na - nb) ** 2).sum(2))
    assert np.allclose(discrepancy(a, b), l1.mean(1))
    assert np.allclose(discrepancy(a, b, "l2"), l2.mean(1))
    assert np.allclose(discrepancy(a, b, "l2", squared=True), (l2**2).mean(1))
    assert np.allclose(discrepancy(a, b, "l2", normalised=True), (l2 / width).mean(1))
    assert np.allclose(discrepancy(a, b, normalised=True), (l1 / width).mean(1))
    true, target = torch.tensor([0, 1]), torch.tensor([2, 0])
    assert classes_of("two", true, target, 3).tolist() == [[0, 2], [1, 0]]
    assert classes_of("one", true, target, 3).tolist() == [[0], [1]]
    assert classes_of("all", true, target, 3).tolist() == [[0, 1, 2]] * 2
    with pytest.raises(ValueError, match="known are l1, l2"):
        discrepancy(a, b, "l3")
    with pytest.raises(ValueError, match="known are all, one, two"):
        classes_of("both", true, target, 3)


def test_no_prediction_change_below_the_bound():
    """The proposition, on random networks and random pairs of images of which one is predicted otherwise."""
    tried, least = 0, np.inf
    for seed in range(40):
        model = tiny(seed)
        x, _ = batch(16, seed=seed)
        other, _ = batch(16, seed=seed + 1000)
        scale = 10.0 ** np.random.default_rng(seed).integers(-1, 3)
        with torch.no_grad():
            other = (x + scale * (other - 0.5))
            true, target = model(x).argmax(1), model(other).argmax(1)
            apart, bound = tightness(model, x, other, true, target)
            assert torch.allclose(bound, lower_bound(model(x), true, target))
        changed = true != target
        assert (apart >= bound - 1e-12)[changed].all()
        tried += int(changed.sum())
        if changed.any():
            least = min(least, float((apart / bound)[changed].min()))
    assert tried > 50 and 1 <= least < 10


# ------------------------------------------------------------------------------------------------------------- training


def afresh(model, x, changed, y, method, as_released=True):
    """(outer loss, what x' maximises) as scalars: mean and sum, sample by sample, with plain loops."""
    outer, inner = [], []
    weight = model.head.weight

    def attributed(start, end, value):
        total = 0
        for k in range(1, 6):
            z = start + (end - start) * k / 5
            if not z.requires_grad:
                z.requires_grad_()
            total = total + torch.autograd.grad(value(z), z, create_graph=True)[0]
        return (end - start) * total / 5

    for i in range(len(y)):
        a, b, c = x[i : i + 1], changed[i : i + 1], int(y[i])
        fa, fb = model(a)[0], model(b)[0]
        ce, ce_changed = -fa.log_softmax(0)[c], -fb.log_softmax(0)[c]
        s = fb.softmax(0)
        s = [s[j] / sum(s[k] for k in range(CLASSES) if k != c) for j in range(CLASSES)]
        difference = (model.feature_map(model.hidden(a)) - model.feature_map(model.hidden(b)))[0]
        apart = [sum(weight[j, d] * difference[d] for d in range(len(difference))).abs().sum() for j in range(CLASSES)]
        base, penalty = (ce_changed if method in ("adv", "intadv", "int2adv", "igsum", "intigadv") else ce), 0.0
        if method == "trades":
            penalty = sum(fa.softmax(0) * (fa.log_softmax(0) - fb.log_softmax(0)))
        elif method == "intone":
            penalty = 0.01 * apart[c]
        elif method in ("int", "intadv", "int2", "int2adv"):
            penalty = 0.01 * (apart[c] + sum(s[j] * apart[j] for j in range(CLASSES) if j != c))
        elif method.startswith("i"):
            found = attributed(a, b, lambda z, c=c: -model(z)[0].log_softmax(0)[c])
            norm = found.abs().sum()
            penalty = norm / len(y) if as_released else norm
            if method.startswith("intig") and as_released:
                penalty = 0.01 * (norm + found.sum(1).abs().sum()) / len(y)
            elif method.startswith("intig"):
                norms = [attributed(a, b, lambda z, j=j: model(z)[0, j]).abs().sum() for j in range(CLASSES)]
                penalty = 0.01 * (norms[c] + sum(s[j] * norms[j] for j in range(CLASSES) if j != c))
        outer.append(base + penalty)
        inner.append(ce_changed if method.startswith("int2") else base + penalty)
    return sum(outer) / len(y), sum(inner)


@pytest.mark.parametrize("method, as_released", [
    *((name, True) for name in objectives.METHODS if name != "normal"),
    *((name, False) for name in objectives.METHODS if "ig" in name),
])
def test_objectives_equal_a_plain_computation(method, as_released):
    eps, alpha = 0.1, 0.07
    model, (x, y) = tiny(3, colours=2), batch(colours=2, seed=3)
    objective = objectives.Objective(method, ramp=objectives.Ramp(eps, -1, -1), inner_steps=2, step_size=alpha,
                                     steps_per_epoch=1, seed=5, as_released=as_released)
    objective.epoch(0)
    loss, logits = objective(model, x, y)

    noise = torch.rand(x.shape, generator=torch_rng(5, "inner", 0), dtype=x.dtype)
    changed = (x + eps * (2 * noise - 1)).clamp(0, 1)
    for _ in range(2):
        changed = changed.detach().requires_grad_()
        (slope,) = torch.autograd.grad(afresh(model, x, changed, y, method, as_released)[1], changed)
        changed = torch.minimum(torch.maximum(changed.detach() + alpha * slope.sign(), x - eps), x + eps).clamp(0, 1)
    expected, _ = afresh(model, x, changed, y, method, as_released)
    assert torch.allclose(loss, expected, rtol=1e-9)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-12)
    at = changed if objective.method.adversarial else x
    assert torch.allclose(logits, model(at))


def test_objective_without_perturbation_is_cross_entropy():
    model, (x, y) = tiny(), batch()
    for method in objectives.METHODS:
        objective = objectives.Objective(method, ramp=objectives.Ramp(0.3, 5, 10), inner_steps=40, step_size=0.01,
                                         steps_per_epoch=3, seed=0)
        objective.epoch(1)
        assert torch.equal(objective(model, x, y)[0], F.cross_entropy(model(x), y)) and objective.step == 4


def test_ramp_by_hand():
    ramp = objectives.Ramp(0.3, 2000, 10000)
    assert [ramp(step) for step in (0, 2000, 6000, 10000, 50000)] == pytest.approx([0, 0, 0.15, 0.3, 0.3])
    assert ramp(2001) > 0 and objectives.Ramp(0.3, -1, -1)(0) == 0.3
    cifar = objectives.Ramp(8 / 255, 5000, 70000)
    assert cifar(37500) == pytest.approx(4 / 255) and cifar(70001) == 8 / 255


def test_objective_asks_to_be_the_hook_too():
    options = {"ramp": objectives.Ramp(0.1, -1, -1), "inner_steps": 1, "step_size": 0.1, "steps_per_epoch": 1,
               "seed": 0}
    with pytest.raises(RuntimeError, match="hook=o"):
        objectives.Objective("adv", **options)(tiny(), *batch())


def test_training_continues_to_the_same_bits(tmp_path):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (24, 8, 8, 1), np.uint8), draw.integers(0, CLASSES, 24)
    recipe = Recipe(epochs=3, lr=1e-2, batch_size=8, optimizer="adam", weight_decay=0.0, schedule="constant", crop=0,
                    flip=False, drop_last=True)

    def train(path=None, after_step=None):
        model = initialise(GapClassifier(Chain(1, [(3, 4, 2), (5, 3, 1)]), CLASSES), 0)
        objective = objectives.Objective("int", ramp=objectives.Ramp(0.2, 1, 5), inner_steps=2, step_size=0.05,
                                         steps_per_epoch=3, seed=4)
        fit(model, images, labels, recipe, seed=7, objective=objective, hook=objective, checkpoint=path,
            checkpoint_seconds=0, after_step=after_step)
        assert objective.step == 9
        return model.state_dict()

    class Killed(Exception):
        pass

    steps = []

    def kill(_):
        steps.append(1)
        if len(steps) == 8:
            raise Killed

    whole = train()
    with pytest.raises(Killed):
        train(tmp_path / "state.pt", kill)
    again = train(tmp_path / "state.pt")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


# -------------------------------------------------------------------------------------------------------------- attacks


def test_snapshots_equal_separate_runs():
    model, (x, y) = tiny(), batch()
    found = attacks.snapshots(model, x, y, eps=0.08, steps=(1, 4, 12))
    for steps, z in found.items():
        assert torch.equal(z, attacks.snapshots(model, x, y, eps=0.08, steps=(steps,))[steps])
        assert (z - x).abs().max() <= min(0.01 * steps, 0.08) + 1e-12 and z.min() >= 0 and z.max() <= 1
    losses = [F.cross_entropy(model(z), y).item() for z in (x, *found.values())]
    assert losses == sorted(losses) and losses[-1] > losses[0]
    with pytest.raises(ValueError, match="must increase"):
        attacks.snapshots(model, x, y, eps=0.1, steps=(10, 1))


def test_restarts_keep_the_worst_point_of_each_image():
    model, (x, y) = tiny(), batch(6)
    options = {"eps": 0.2, "steps": 3, "step_size": 0.02}
    one = attacks.restarted(model, x, y, restarts=1, rng=np.random.default_rng(0), **options)
    many = attacks.restarted(model, x, y, restarts=5, rng=np.random.default_rng(0), **options)
    assert (attacks.margin(model(many), y) >= attacks.margin(model(one), y)).all()
    assert (many - x).abs().max() <= 0.2 + 1e-12 and not torch.equal(one, many)


def test_points_are_those_of_the_legacy_generator():
    labels = np.arange(50) % 10
    found = attacks.points(labels, 10, count=20)
    np_state = np.random.RandomState(99)
    assert np.array_equal(found.index, np_state.permutation(50)[:20])
    assert np.array_equal(found.target, (labels[found.index] + 1 + np_state.randint(9, size=20)) % 10)
    assert (found.target != labels[found.index]).all()
    expected = np_state.uniform(-0.3, 0.3, (20, 4, 4, 3))
    noise = aai.noise(found.draw, torch.zeros(20, 3, 4, 4, dtype=torch.float64), 0.3)
    assert np.array_equal(noise.numpy(), expected.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match="51 points of 50"):
        attacks.points(labels, 10, count=51)


def tau_b(a, b):
    concordant = ties_a = ties_b = pairs = 0
    for i in range(len(a)):
        for j in range(i):
            concordant += np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
            ties_a, ties_b, pairs = ties_a + (a[i] == a[j]), ties_b + (b[i] == b[j]), pairs + 1
    return concordant / np.sqrt((pairs - ties_a) * (pairs - ties_b))


def test_agreement_is_kendalls_tau_by_hand():
    assert kendalltau([1, 2, 3], [1, 3, 2]).statistic == pytest.approx(1 / 3) == tau_b([1, 2, 3], [1, 3, 2])
    model, (x, y), (other, _) = tiny(), batch(4), batch(4, seed=9)
    tau, stayed = aai.agreement(model, x, other, y)
    for i in range(4):
        maps = [model.class_maps(model.hidden(z[i : i + 1]))[0, y[i]].detach().numpy().ravel() for z in (x, other)]
        assert tau[i] == pytest.approx(tau_b(*maps))
    assert np.array_equal(stayed, (model(x).argmax(1) == model(other).argmax(1)).numpy())
    tau, stayed = aai.agreement(model, x, x, y)
    assert tau == pytest.approx(1) and stayed.all()


@pytest.mark.parametrize("kind", ["cam", "gradcam++"])
def test_top_k_attack_lowers_the_largest_cells(kind):
    model, (x, y) = tiny(), batch()
    start = x + aai.noise(np.random.RandomState(0), x, 0.1)
    changed = aai.top_k(model, x, y, start, eps=0.1, k=3, steps=20, kind=kind)
    clean, attacked = (interpret(model, z, y[:, None], kind).flatten(1) for z in (x, changed))
    cells = clean.argsort(1, descending=True)[:, :3]
    assert (attacked.gather(1, cells).sum(1) < clean.gather(1, cells).sum(1)).all()
    assert (changed - x).abs().max() <= 0.1 + 1e-12 and changed.min() >= 0 and changed.max() <= 1
    assert aai.agreement(model, x, changed, y, kind)[0].max() < 1
    with pytest.raises(ValueError, match="has only 16 cells"):
        aai.top_k(model, x, y, start, eps=0.1, k=17, kind=kind)
    with pytest.raises(ValueError, match="no map of the true class"):
        aai.top_k(model, x, y, start, eps=0.1, kind="repr")


# ------------------------------------------------------------------------------------------------------------------ isa


def predicted(n=6):
    """A network, images, its predictions, and targets of which at least one is in reach."""
    model, (x, _) = tiny(2), batch(n, seed=2)
    with torch.no_grad():
        logits = model(x)
    return model, x, logits.argmax(1), logits.argsort(1, descending=True)[:, 1]


def test_descent_by_hand():
    model, x, _, target = predicted(2)
    eps = torch.tensor([0.1, 0.3], dtype=x.dtype)
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(attacks.margin(model(z), target).mean(), z)
    expected = x - 0.2 * eps[:, None, None, None] * (1000 * slope).clamp(-1, 1)
    found = isa.descend(lambda z: attacks.margin(model(z), target).mean(), x, eps, steps=1)
    assert torch.allclose(found, expected.clamp(0, 1))


def test_least_epsilon_is_enough_and_little_less_is_not():
    model, x, _, target = predicted()
    changed, eps = isa.least_epsilon(model, x, target)
    reached = eps < 1
    assert reached.any()
    assert (attacks.margin(model(changed), target) < 0)[reached].all()
    assert ((changed - x).abs().amax((1, 2, 3)) <= eps + 1e-12).all()
    less = isa.descend(lambda z: attacks.margin(model(z), target).clamp(min=-0.1).mean(), x, 0.9 * eps)
    assert (attacks.margin(model(less), target) >= 0)[reached].all()
    parts = slice(3), slice(3, None)
    halves = [isa.least_epsilon(model, x[part], target[part], population=len(x))[1] for part in parts]
    assert torch.allclose(torch.cat(halves), eps)


def test_sneaking_attack_trades_discrepancy_for_epsilon():
    model, x, true, target = predicted()
    found = isa.curves(model, x, true, target, multipliers=(1.5, 3.0))
    curve = found.monotone()
    assert found.kept.any() and (np.diff(curve, axis=0)[np.isfinite(curve[:-1])] <= 0).all()
    summary = found.summary()
    assert summary["discrepancy"] > 0 and summary["slope"] >= 0
    _, gamma = isa.sneak(model, x, true, target, 3 * isa.least_epsilon(model, x, target)[1])
    assert (gamma > 0).any()
    with pytest.raises(ValueError, match="must increase"):
        isa.curves(model, x, true, target, multipliers=(2.0, 1.0))


@pytest.mark.parametrize("scope, norm, kind", [("one", "l1", "gradcam++"), ("all", "l2", "cam"), ("two", "l2", "repr"),
                                               ("two", "l1", "ig")])
def test_sneaking_attack_takes_every_discrepancy(monkeypatch, scope, norm, kind):
    monkeypatch.setattr(isa, "ROUNDS", 1)
    model, x, true, target = predicted(2)
    eps = torch.full((2,), 0.2, dtype=x.dtype)
    changed, _ = isa.sneak(model, x, true, target, eps, scope=scope, norm=norm, kind=kind)
    assert (changed - x).abs().max() <= 0.2 + 1e-12 and not torch.equal(changed, x)


def test_summary_of_curves_by_hand():
    kept = np.array([[True, True, False, False], [True, True, True, False], [True, True, True, False]])
    height = np.array([[4.0, 2, 9, 9], [5, 3, 6, 9], [1, 4, 3, 9]])
    eps = np.array([[0.1] * 4, [0.2] * 4, [0.3] * 4])
    found = isa.Curves(height, eps, kept)
    # image 0: 4, 4, 1; image 1: 2, 2, 2 (flat, left out); image 2: 6, 3; image 3: nothing
    slope = (4 - 1) * 0.1 / ((0.3 - 0.1) * 4) + (6 - 3) * 0.2 / ((0.3 - 0.2) * 6)
    summary = found.summary()
    assert summary["discrepancy"] == pytest.approx((4 + 4 + 1 + 6 + 3) / 5)
    assert summary["slope"] == pytest.approx(slope / 5) and summary["slope_per_image"] == pytest.approx(slope / 2)
    assert np.isnan(isa.Curves(height, eps, kept & False).summary()["slope"])


# ----------------------------------------------------------------------------------------------------------- unforeseen


def test_jpeg_without_rounding_gives_back_smooth_colours():
    grey = torch.from_numpy(np.random.default_rng(0).random((2, 1, 32, 48))).expand(-1, 3, -1, -1)
    found = unforeseen.encode(grey)
    assert found.shape == (2, 32 * 48 * 3 // 2) and torch.allclose(unforeseen.decode(found, 32, 48), grey, atol=1e-5)
    block = dctn(255 * grey[1, 0, 8:16, 16:24].numpy() - 128, norm="ortho") / unforeseen._LUMINANCE
    assert np.allclose(found[1, (6 + 2) * 64 : (6 + 3) * 64].reshape(8, 8), block)
    colours = torch.from_numpy(np.random.default_rng(1).random((1, 3, 16, 16))).repeat_interleave(2, 2)
    colours = colours.repeat_interleave(2, 3)
    assert torch.allclose(unforeseen.decode(unforeseen.encode(colours), 32, 32), colours, atol=1e-5)


def test_frank_wolfe_by_hand():
    v = torch.tensor([[0.5, -1.0, 0.0, 2.0]])
    gradient = torch.tensor([[3.0, -4.0, 1.0, 2.0]])
    # room in the order of |gradient|: 1 (to -2), 1.5 (to 2), 0 (at 2 already), 2
    assert unforeseen.frank_wolfe(v, gradient, 3.0).tolist() == [[1.5, -1, 0.5, 0]]


@pytest.mark.parametrize("name, mean, deviation", [
    ("fog", 0.4267, 0.3462), ("gabor", 0.7639, 0.3171), ("snow", 0.8560, 0.2016),
    ("jpeg_linf", 0.4996, 0.2267), ("jpeg_l2", 0.4999, 0.2293), ("jpeg_l1", 0.5000, 0.2521)])
def test_unforeseen_attacks_reach_for_the_target(name, mean, deviation):
    """The numbers are those of the version that was checked against plain loops over the corruptions' definitions."""
    model = initialise(GapClassifier(Chain(3, [(4, 4, 4), (6, 3, 2)]), CLASSES), 0)
    x, y = batch(3, 32, 3)
    x, target = x.float(), (y + 1) % CLASSES

    def attacked(iterations, **settings):
        return unforeseen.attack(name, model, x, target, rng=np.random.default_rng(0), iterations=iterations, **settings)

    first, last = attacked(0), attacked(12)
    assert last.shape == x.shape and last.dtype == x.dtype and last.min() >= 0 and last.max() <= 1
    assert (last.mean().item(), last.std().item()) == pytest.approx((mean, deviation), abs=2e-3)
    assert torch.equal(last, attacked(12)) and not torch.equal(first, last)
    assert F.cross_entropy(model(last), target) < F.cross_entropy(model(first), target)
    if name.startswith("jpeg"):
        assert torch.allclose(attacked(3, eps=1e-4), unforeseen.decode(unforeseen.encode(x), 32, 32), atol=0.01)


def test_unforeseen_attacks_name_what_they_need():
    x, y = batch(1, 28)
    with pytest.raises(ValueError, match="square RGB"):
        unforeseen.attack("fog", tiny(), x, y, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="unknown attack 'rain'"):
        unforeseen.attack("rain", tiny(), x, y, rng=np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------------------- released


def released_layers(model):
    layers = []
    for conv in [module for module in model.modules() if isinstance(module, SameConv2d)]:
        weight = conv.weight.detach().permute(2, 3, 1, 0)
        layers.append((np.ascontiguousarray(weight.numpy()), conv.bias.detach().numpy()))
        if getattr(model.extractor, "pooled", False):
            layers.append((np.full((2, 2), np.nan, np.float32), np.float32(np.nan)))
    return [*layers, (model.head.weight.detach().numpy().T[None, None].copy(),)]


def dump(path, content, protocol=3):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("name, colours, classes", [("small", 1, 10), ("pool", 1, 10), ("wresnet", 3, 9)])
def test_released_weights_come_back(tmp_path, name, colours, classes):
    model = build(name, in_channels=colours, num_classes=classes, seed=3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SameConv2d):
                module.bias.add_(torch.arange(len(module.bias)))
    path = dump(tmp_path / "net.pkl", released_layers(model))
    found = released.load(path, name)
    for (key, value), (other, expected) in zip(found.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other and torch.equal(value, expected)
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != path.read_bytes() or np.lib.NumpyVersion(np.__version__) < "2.0.0"
    (tmp_path / "old.pkl").write_bytes(old)
    assert len(released.read(tmp_path / "old.pkl")) == len(released_layers(model))


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_malicious_pickles_are_refused(tmp_path):
    mark = tmp_path / "ran"
    good = released_layers(tiny().float())
    cases = [
        (Evil(os.system, f"touch {mark}"), "system"),
        ([*good, Evil(eval, f"open({str(mark)!r}, 'w')")], "eval"),
        ([*good, Evil(os.mkdir, str(mark))], "mkdir"),
        ([*good, Evil(np.load, str(mark))], "load"),
        ([*good, (Evil(np.ndarray, (1 << 40,)),)], "may not be called"),
        ([(np.array([Evil(os.mkdir, str(mark))], dtype=object),)], "refused"),
        ([(np.array(["a"], dtype=object),)], "'O8' is refused"),
        ([(np.arange(3),)], "'i8' is refused"),
        ({"weights": good}, "expected a list of tuples"),
        ([], "expected a list of tuples"),
        ([(1.0,)], "expected a list of tuples"),
    ]
    for content, reason in cases:
        for protocol in (2, 3, 4):
            with pytest.raises(released.NotReleased, match=reason if protocol > 2 else "refused|expected|called"):
                released.read(dump(tmp_path / "evil.pkl", content, protocol))
    by_hand = [
        b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",  # protocol 0
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(N}S'__code__'\nNstb.",  # attributes of the callable
        b"\x80\x03X\x04\x00\x00\x00okayQ.",  # a persistent id
        b"\x80\x03]q\x00(",
        b"not a pickle",
        b"",
    ]
    for content in by_hand:
        (tmp_path / "evil.pkl").write_bytes(content)
        with pytest.raises(released.NotReleased):
            released.read(tmp_path / "evil.pkl")
    assert not mark.exists()
    with pytest.raises(FileNotFoundError):
        released.read(tmp_path / "nothing.pkl")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    layers = released_layers(build("small", in_channels=1))
    path = dump(tmp_path / "net.pkl", layers)
    with pytest.raises(released.NotReleased, match="31 convolutions and a head, the file has 4"):
        released.load(path, "wresnet")
    with pytest.raises(ValueError, match="known are pool, small, wresnet"):
        released.load(path, "smallgap")
    narrow = [(layers[0][0][..., :8].copy(), layers[0][1]), *layers[1:]]
    with pytest.raises(released.NotReleased, match="layer 0 of network 'small' needs"):
        released.load(dump(path, narrow), "small")
    broken = [*layers[:3], (np.full_like(layers[3][0], np.nan),)]
    with pytest.raises(released.NotReleased, match="not finite"):
        released.load(dump(path, broken), "small")
