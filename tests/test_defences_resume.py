"""Every defence that is killed again and again ends with the bits of a run that is left alone."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from torch import nn

from cupel.compat import ensure_torchvision
from cupel.images.defences import DEFENCES, Budget, purify
from cupel.images.models import Classifier, Normalize, Parts, build
from cupel.images.models.torchvision_zoo import VisionTransformer
from cupel.rng import rng
from cupel.training.resume import Checkpoint, DamagedCheckpoint, Resume

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
TUNE = {"epochs": 3, "batch_size": 16}
IMS = {"rounds_initial": 3, "rounds_minimise": 3, "steps_perturb": 2, "batch_size": 16, "lr_mask": 0.2}

#: a few rounds of every loop
FEW = {
    "anp": {"iterations": 4, "batch_size": 16, "threshold_step": 0.45},
    "awn": {"epochs": 3, "batch_size": 16},
    "bnp": {},
    "bti_dbf": {"rounds": 2, "pretrain_epochs": 2, "mask_epochs": 1, "generator_epochs": 1, "unlearn_epochs": 2,
                "generator_width": 4, "batch_size": 16},
    "clp": {},
    "fe_tuning": TUNE,
    "fmp": {"samples": 2, "epochs": 2, "fraction": 0.1, "batch_size": 16},
    "fp": {**TUNE, "step": 0.1, "batch_size": 12},
    "fst": TUNE,
    "ft": TUNE,
    "ft_init": TUNE,
    "ft_long": TUNE,
    "ft_sam": {**TUNE, "schedule_per": "batch", "t_max": 4},
    "i_bau": {"rounds": 2, "iterations": 2, "batch_size": 16, "lr": 1e-3},
    "ims": IMS,
    "ims_vit": IMS,
    "lp": TUNE,
    "mm_bd": {"epochs": 4, "every": 1, "lr": 0.1, "batch_size": 16},
    "nad": {**TUNE, "teacher_epochs": 2},
    "nc": {"search_epochs": 3, "threshold": 0.5, "epochs": 2, "batch_size": 16, "patience": 1, "success": 0.3},
    "nft": TUNE,
    "npd": {"warm_epochs": 2, "epochs": 2, "batch_size": 16},
    "pbe": {"rounds": 2, "steps": 2, "batch_size": 16},
    "rnp": {"unlearn_epochs": 2, "recovery_epochs": 3, "threshold_step": 0.25, "batch_size": 16},
    "sam_ft": TUNE,
    "sau": {"rounds": 3, "steps": 1, "batch_size": 16},
}
#: stages that end early, and learning rates that diverge
MORE = [("ims", {**IMS, "patience": 0, "improvement": 0.5}),
        ("nc", {**FEW["nc"], "stop_patience": 0, "search_epochs": 6}),
        ("rnp", {**FEW["rnp"], "unlearn_lr": 1e4}),
        ("rnp", {**FEW["rnp"], "unlearn_lr": 0.1, "unlearn_threshold": 0.9})]


class Killed(BaseException):
    """The process ends here."""


@functools.cache
def victim_for(name):
    if name != "ims_vit":
        return build("preactresnet18", num_classes=3, width=8, stem_stride=2, image_size=16, seed=0, mean=MEAN, std=STD)
    ensure_torchvision()
    from torchvision.models import VisionTransformer as Net

    torch.manual_seed(0)
    net = Net(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)
    return Classifier(Parts(VisionTransformer(net), nn.Linear(16, 3), stages=("token_map",)), Normalize(MEAN, STD), 3,
                      {"name": "tiny_vit"})


def run(name, settings, checkpoint=None):
    """State and history without its clock, and how many layers were computed."""
    draw = np.random.default_rng(0)
    budget = Budget(draw.integers(0, 256, (36, 16, 16, 3), dtype=np.uint8), np.arange(36) % 3, 3, crop=2,
                    checkpoint=checkpoint and str(checkpoint))
    victim, calls = victim_for("ims_vit" if name == "ims_vit" else ""), [0]

    def count(module, _):
        calls[0] += isinstance(module, nn.Conv2d | nn.Linear)

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        model, history = purify(name, victim, budget, rng(5, name), **settings)
    finally:
        handle.remove()
    return model.state_dict(), [{k: v for k, v in row.items() if k != "seconds"} for row in history], calls[0]


def same(first, second):
    return (first[1] == second[1] and first[0].keys() == second[0].keys()
            and all(torch.equal(value, second[0][key]) for key, value in first[0].items()))


def kill_at_save(monkeypatch, number=1):
    """The process takes its first or a later chance to save, and dies right after."""
    chances, write = [], Checkpoint.write

    def due(self):
        chances.append(1)
        return len(chances) == number

    def last_words(self, state):
        write(self, state)
        raise Killed

    monkeypatch.setattr(Checkpoint, "due", due)
    monkeypatch.setattr(Checkpoint, "write", last_words)


def test_all_defences_are_here():
    assert set(DEFENCES.fill()) == FEW.keys()


@pytest.mark.parametrize(("name", "settings"), [*FEW.items(), *MORE])
def test_killed_again_and_again(name, settings, tmp_path, monkeypatch):
    whole = run(name, settings)
    if (name, settings) in MORE:
        assert not same(whole, run(name, FEW[name]))
    last, kills = None, 0
    while last is None:
        torch.manual_seed(kills)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kills += 1
            kill_at_save(patch, 1 + kills % 2)
            last = run(name, settings, tmp_path / "checkpoint.pt")
    assert same(last, whole)
    if name not in ("bnp", "clp"):
        assert kills > 1 and last[2] < whole[2]


@pytest.mark.parametrize(("name", "change"), [("anp", {"eps": 0.3}), ("nad", {"p": 3.0}), ("sau", {"eps": 0.1})])
def test_a_checkpoint_of_something_else(name, change, tmp_path, monkeypatch, capsys):
    """Of other settings or cut short: the run starts anew."""
    path = tmp_path / "checkpoint.pt"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_save(patch)
        run(name, FEW[name], path)
    other = {**FEW[name], **change}
    assert same(run(name, other, path), run(name, other))
    assert "another run" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-99])
    assert same(run(name, FEW[name], path), run(name, FEW[name]))
    assert "cannot be read" in capsys.readouterr().err


def test_content_that_does_not_fit(tmp_path):
    path, tensor = tmp_path / "checkpoint.pt", torch.arange(3.0)
    work = Resume(path, {"run": 1})
    work.keeper.every = 0
    draws = torch.Generator().manual_seed(1)
    for _ in work.hold(tensor=tensor, draws=draws, history=["row"], found={"class": 2}).each(range(2), "rounds"):
        tensor += 1
        torch.rand(3, generator=draws)
    fresh, stream, history, found = torch.zeros(3), torch.Generator(), [], {}
    again = Resume(path, {"run": 1}).hold(tensor=fresh, draws=stream, history=history, found=found)
    assert torch.equal(fresh, tensor) and history == ["row"] and found == {"class": 2}
    assert torch.equal(stream.get_state(), draws.get_state())
    assert list(again.each(range(3), "rounds")) == [2] and list(again.each("ab", "others")) == ["a", "b"]
    assert Resume(path, {"run": 2}).parts == {}
    with pytest.raises(DamagedCheckpoint, match="shape"):
        Resume(path, {"run": 1}).hold(tensor=torch.zeros(1))
    assert not path.exists()
    torch.save({"identity": Checkpoint(path, {"run": 1}).identity, "parts": 3}, path)
    with pytest.raises(DamagedCheckpoint):
        Resume(path, {"run": 1})
    assert not path.exists()
