"""Passes over the defender's data, for defences with loops of their own, and the stages of their histories."""

from collections.abc import Iterator

import torch

from cupel.images.defences.base import Budget
from cupel.rng import torch_rng
from cupel.training.augment import Draws, augment, to_pixels
from cupel.training.engine import upload


def batches(budget: Budget, batch_size: int, seed: int, number: int, *,
            augmented: bool = True) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One shuffled pass over the budget, the last partial batch kept, as `cupel.training.engine.fit` makes it.

    Args:
        batch_size: samples per batch.
        seed, number: order and augmentation are streams of `seed`, one for each pass `number`.
        augmented: crop and flip as the budget says.

    Yields:
        pixels float32 [B, C, H, W] in [0, 1] and labels int64 [B], on the budget's device.
    """
    device = torch.device(budget.device)
    images, labels = upload(budget.images, device), torch.as_tensor(budget.labels, device=device)
    crop, flip = (budget.crop, budget.flip) if augmented else (0, False)
    order = torch.randperm(len(labels), generator=torch_rng(seed, "order", number)).to(device)
    draws = Draws.draw(len(labels), crop, flip, torch_rng(seed, "augmentation", number), device)
    for index in order.split(batch_size):
        yield augment(to_pixels(images[index]), crop, draws.flip[index], draws.shift[index]), labels[index]


def stage(name: str, rows: list[dict]) -> list[dict]:
    """History rows with the name of the stage they belong to."""
    return [{"stage": name, **row} for row in rows]
