"""What defences do with the defender's data: train on them, pass over them, look into the network meanwhile."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from cupel.images.defences.base import Budget
from cupel.rng import torch_rng
from cupel.training.augment import Draws, augment, to_pixels
from cupel.training.engine import Recipe, cuts, fit, upload


def train(model: nn.Module, budget: Budget, recipe: Recipe, rng: np.random.Generator | int, **settings) -> list[dict]:
    """`fit` on the budget, with its checkpoint; `rng` draws the seed, or is it; `settings` as there. Returns the history."""
    seed = rng if isinstance(rng, int) else int(rng.integers(2**62))
    return fit(model, budget.images, budget.labels, recipe, seed=seed, device=budget.device, checkpoint=budget.checkpoint,
               **settings)


@contextlib.contextmanager
def watched(modules: dict[str, nn.Module], look: Callable, *, inputs: bool = False) -> Iterator[None]:
    """In here `look(name, tensor)` is called with the output of each module, or its input; what it returns replaces that."""
    def hang(name, module):
        if inputs:
            return module.register_forward_pre_hook(lambda _, given: look(name, given[0]))
        return module.register_forward_hook(lambda _, given, output: look(name, output))

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(hang(name, module))
        yield


def batches(budget: Budget, batch_size: int, seed: int, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One shuffled pass over the budget, in the batches of `cupel.training.engine.cuts`, as `fit` makes it.

    Args:
        batch_size: samples per batch.
        seed, number: order and augmentation are streams of `seed`, one for each pass `number`.

    Yields:
        pixels float32 [B, C, H, W] in [0, 1] and labels int64 [B], on the budget's device.
    """
    device = torch.device(budget.device)
    images, labels = upload(budget.images, device), torch.as_tensor(budget.labels, device=device)
    order = torch.randperm(len(labels), generator=torch_rng(seed, "order", number)).to(device)
    draws = Draws.draw(len(labels), budget.crop, budget.flip, torch_rng(seed, "augmentation", number), device)
    for part in cuts(len(labels), batch_size):
        index = order[part]
        yield augment(to_pixels(images[index]), budget.crop, draws.flip[index], draws.shift[index]), labels[index]


def stage(name: str, rows: list[dict]) -> list[dict]:
    """History rows with the name of the stage they belong to."""
    return [{"stage": name, **row} for row in rows]
