"""The engine: augmentation against an independent computation, schedules, resume to the bit, and the tuning family."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cupel.images import models
from cupel.images.defences import Budget, purify
from cupel.images.defences.tuning import project
from cupel.rng import rng
from cupel.training.augment import Draws, augment, to_pixels
from cupel.training.engine import Checkpoint, Diverged, Recipe, fit, predict


def data(n=96, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (n, 16, 16, 3), np.uint8), draw.integers(0, 4, n)


def net(seed=0):
    return models.build("preactresnet18", num_classes=4, image_size=16, width=8, stem_stride=2, seed=seed)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_augmentation_equals_the_plain_loop():
    images, _ = data(20)
    x = to_pixels(torch.from_numpy(images))
    draws = Draws.draw(20, 4, True, torch.Generator().manual_seed(0), torch.device("cpu"))
    found = augment(x, 4, draws.flip, draws.shift)
    for k in range(20):
        padded = np.pad(images[k], ((4, 4), (4, 4), (0, 0)))
        r, c = draws.shift[k].tolist()
        crop = padded[r : r + 16, c : c + 16]
        crop = crop[:, ::-1] if draws.flip[k] else crop
        assert np.allclose(found[k].permute(1, 2, 0).numpy() * 255, crop, atol=1e-4)
    assert draws.flip.any() and not draws.flip.all()


def test_fit_equals_a_plain_pytorch_loop():
    """Without augmentation, in the order of the stream: the same weights as a loop written by hand."""
    from cupel.rng import torch_rng

    images, labels = data()
    recipe = Recipe(epochs=2, lr=0.05, batch_size=32, crop=0, flip=False)
    ours = net()
    fit(ours, images, labels, recipe, seed=5)
    plain = net().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    for epoch in range(2):
        for index in torch.randperm(96, generator=torch_rng(5, "order", epoch)).split(32):
            x = torch.from_numpy(images)[index].permute(0, 3, 1, 2).float() / 255
            loss = F.cross_entropy(plain(x), torch.from_numpy(labels)[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "plateau", "multistep"])
def test_killed_run_continues_to_the_same_bits(tmp_path, schedule):
    images, labels = data()
    recipe = Recipe(epochs=4, lr=0.05, batch_size=32, schedule=schedule, milestones=(2,))
    whole = net()
    expected = fit(whole, images, labels, recipe, seed=1)

    class Killed(Exception):
        pass

    calls = []

    def kill(_):
        calls.append(1)
        if len(calls) == 8:  # in the middle of the third epoch
            raise Killed

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        fit(net(), images, labels, recipe, seed=1, checkpoint=path, checkpoint_seconds=0, after_step=kill)
    assert path.exists()
    continued = net(seed=99)  # whatever the fresh weights are, the checkpoint's count
    history = fit(continued, images, labels, recipe, seed=1, checkpoint=path, checkpoint_seconds=0)
    assert same(whole, continued)

    def timeless(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert timeless(history) == timeless(expected)


def test_checkpoint_of_another_run_is_not_continued(tmp_path, capsys):
    path = tmp_path / "c.pt"
    Checkpoint(path, {"lr": 0.1}, every=0).save({"epoch": 1})
    assert Checkpoint(path, {"lr": 0.1}).load(torch.device("cpu"))["epoch"] == 1
    assert Checkpoint(path, {"lr": 0.2}).load(torch.device("cpu")) is None
    path.write_bytes(b"junk")
    assert Checkpoint(path, {"lr": 0.1}).load(torch.device("cpu")) is None
    assert "another run" in capsys.readouterr().err


def test_poisoned_pickle_is_not_executed(tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    path = tmp_path / "c.pt"
    path.write_bytes(pickle.dumps(Evil()))
    assert Checkpoint(path, {}).load(torch.device("cpu")) is None
    torch.save({"identity": Evil()}, path)
    assert Checkpoint(path, {}).load(torch.device("cpu")) is None
    assert not (tmp_path / "owned").exists()


def test_divergence_is_an_error():
    images, labels = data()
    with pytest.raises(Diverged, match="epoch"):
        fit(net(), images, labels, Recipe(epochs=3, lr=1e30, batch_size=32), seed=0)


def test_too_few_samples_for_a_batch():
    images, labels = data(20)
    with pytest.raises(ValueError, match="do not fill one batch"):
        fit(net(), images, labels, Recipe(epochs=1, lr=0.1, drop_last=True), seed=0)


def budget(n=96):
    images, labels = data(n)
    return Budget(images, labels, 4, crop=0, flip=False)


@pytest.fixture(scope="module")
def victim():
    model = net(3)
    images, labels = data(seed=1)
    fit(model, images, labels, Recipe(epochs=2, lr=0.1, batch_size=32), seed=0)
    return model


@pytest.mark.parametrize("name", ["ft", "lp", "fe_tuning", "ft_init", "fst"])
def test_what_each_mode_trains(victim, name):
    before = copy.deepcopy(victim)
    model, history = purify(name, victim, budget(), rng(0, name), epochs=2, batch_size=32)
    assert same(before, victim), "a defence must not change the victim"
    moved = {key: not torch.equal(a, b) for (key, a), b in
             zip(model.state_dict().items(), victim.state_dict().values(), strict=True)}
    convs = [key for key in moved if key.endswith("weight") and key.startswith("extractor")]
    assert any(moved[key] for key in convs) == (name != "lp")
    assert moved["head.weight"]
    assert any(moved[key] for key in moved if key.endswith("running_mean")), "train mode: BN statistics move in all"
    assert len(history) == 2
    again, _ = purify(name, victim, budget(), rng(0, name), epochs=2, batch_size=32)
    assert same(model, again)


def test_fe_tuning_freezes_a_fresh_head(victim):
    one, _ = purify("fe_tuning", victim, budget(), rng(0), epochs=1, batch_size=32)
    three, _ = purify("fe_tuning", victim, budget(), rng(0), epochs=3, batch_size=32)
    assert torch.equal(one.head.weight, three.head.weight) and not torch.equal(one.head.weight, victim.head.weight)
    bound = victim.head.in_features**-0.5
    assert one.head.weight.abs().max() <= bound and one.head.weight.abs().max() > 0.5 * bound


def test_fst_keeps_the_norm_and_moves_away(victim):
    model, _ = purify("fst", victim, budget(), rng(0), epochs=2, batch_size=32)
    assert torch.allclose(model.head.weight.norm(), victim.head.weight.norm(), rtol=1e-5)
    init, _ = purify("ft_init", victim, budget(), rng(0), epochs=2, batch_size=32)
    pushed, _ = purify("fst", victim, budget(), rng(0), epochs=2, batch_size=32, alpha=5.0)
    inner = [(m.head.weight * victim.head.weight).sum().item() for m in (pushed, init)]
    assert inner[0] < inner[1]


def test_fst_step_equals_the_formula(victim):
    """One step on one batch, against gradients and projection written by hand."""
    images, labels = data(32)
    alpha, lr = 0.2, 0.01
    one = Budget(images, labels, 4, crop=0, flip=False)
    stream = rng(4)
    model, history = purify("fst", victim, one, rng(4), epochs=1, batch_size=32, alpha=alpha, lr=lr)
    from cupel.images.defences.tuning import reinitialise
    from cupel.rng import torch_rng

    plain = copy.deepcopy(victim).to(memory_format=torch.channels_last)
    reinitialise(plain.head, torch_rng(int(stream.integers(2**62)), "head"))
    seed = int(stream.integers(2**62))
    order = torch.randperm(32, generator=torch_rng(seed, "order", 0))
    plain.train()
    x = torch.from_numpy(images)[order].permute(0, 3, 1, 2).float() / 255
    loss = F.cross_entropy(plain(x), torch.from_numpy(labels)[order])
    grads = torch.autograd.grad(loss, list(plain.parameters()))
    penalty = alpha * (plain.head.weight * victim.head.weight).sum().item()
    assert history[0]["penalty"] == pytest.approx(penalty, rel=1e-5)
    assert history[0]["loss"] == pytest.approx(loss.item() + penalty, rel=1e-5)
    with torch.no_grad():
        for p, g in zip(plain.parameters(), grads, strict=True):
            p -= lr * (g + (alpha * victim.head.weight if p is plain.head.weight else 0))
        plain.head.weight *= victim.head.weight.norm() / plain.head.weight.norm()
    assert torch.allclose(model.head.weight, plain.head.weight, atol=1e-6)
    assert torch.allclose(model.head.bias, plain.head.bias, atol=1e-6)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_fst_says_how_far_its_penalty_can_go(victim, capsys):
    square = victim.head.weight.square().sum().item()
    for alpha, dwarfs in ((1e-3, False), (1e3, True)):
        purify("fst", victim, budget(), rng(0), epochs=2, batch_size=32, alpha=alpha, lr=1e-6)
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fst: ")]
        assert f"-{alpha * square:.3g}," in said and ("decide" in said) == dwarfs


@pytest.mark.parametrize("name", ["ft", "lp", "fe_tuning", "ft_init"])
def test_every_mode_can_project_its_head(victim, name):
    """One step with all samples, against the free step rescaled by hand."""
    settings = {"epochs": 1, "batch_size": 96}
    free, projected = (purify(name, victim, budget(), rng(0), projected=p, **settings)[0] for p in (False, True))
    weight = free.head.weight * victim.head.weight.norm() / free.head.weight.norm()
    torch.testing.assert_close(projected.head.weight, weight)
    assert not torch.allclose(free.head.weight, weight, rtol=1e-5)
    assert torch.equal(projected.head.bias, free.head.bias)
    assert all(torch.equal(a, b) for a, b in zip(free.extractor.parameters(), projected.extractor.parameters(), strict=True))


def test_projection_leaves_the_bias(victim):
    head = copy.deepcopy(victim.head)
    project(head, torch.tensor(7.0))
    assert abs(head.weight.norm().item() - 7) < 1e-5 and torch.equal(head.bias, victim.head.bias)


def test_unknown_hyperparameter(victim):
    with pytest.raises(ValueError, match=r"parameter of defence fst 'alfa'.*did you mean 'alpha'"):
        purify("fst", victim, budget(), rng(0), alfa=1)


def test_budget_split_has_every_class():
    part, validation = budget().split(0.1, np.random.default_rng(0))
    assert len(part) + len(validation) == 96 and set(validation.labels) == {0, 1, 2, 3}


def test_predict_in_batches_equals_one_pass(victim):
    images, _ = data(50)
    assert np.allclose(predict(victim, images, batch_size=7), predict(victim, images), atol=1e-5)


def test_predicting_leaves_a_network_that_can_be_trained():
    model = models.build("preactresnet18", num_classes=4, image_size=16, width=8, stem_stride=2, seed=0)
    predict(model, np.zeros((2, 16, 16, 3), np.uint8))
    assert not any(p.is_inference() for p in model.parameters())
