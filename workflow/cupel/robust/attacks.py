"""Attacks on the prediction in an l_inf ball, pixels in [0, 1] (proper_interpretability SPEC 2.6, 3.1).

    x' ← Π_[0,1] Π_[x−ε, x+ε] ( x' + α sign ∇ L(x') ),    last iterate

The paper's evaluation starts at x itself and keeps α = 0.01 for every ε and number of steps, so that k steps reach no
further than 0.01 k. It is deterministic: one run of 200 steps holds those of 1, 10 and 100 steps as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.training.adversarial import perturb

STEPS = (1, 10, 100, 200)


@dataclass(frozen=True)
class Points:
    """The test images that an evaluation looks at."""

    index: np.ndarray  # int64 [n], into the test set
    target: np.ndarray  # int64 [n], wrong classes for the targeted attacks
    draw: np.random.RandomState  # NumPy's legacy generator behind those draws; the start of AAI comes out of it


def points(labels: np.ndarray, num_classes: int, *, count: int = 200, seed: int = 99) -> Points:
    """The images that the released code takes of a test set with labels int64 [N]: the first `count` of a permutation, targets
    (y + 1 + U{0..K-2}) mod K. The seed is 99 as released (ISA on CAM: 123).

    Raises:
        ValueError: fewer than `count` images.
    """
    if count > len(labels):
        raise ValueError(f"cannot take {count} points of {len(labels)} test images")
    draw = np.random.RandomState(seed)
    index = draw.permutation(len(labels))[:count]
    return Points(index, (labels[index] + 1 + draw.randint(num_classes - 1, size=count)) % num_classes, draw)


def box(x: Tensor, eps: float | Tensor) -> Callable[[Tensor], Tensor]:
    """Projection to |x' − x| ≤ ε, then to [0, 1]; `eps` a number or [B, 1, 1, 1]."""
    low, high = x - eps, x + eps
    return lambda z: torch.maximum(torch.minimum(z, high), low).clamp(0, 1)


def ascend(loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, *, eps: float, steps: int,
           step_size: float) -> Tensor:
    """Maximise by signed steps from `start`, in the ball around x, float [B, C, H, W]: x', detached.

    `loss` is a sum over samples, whose gradient keeps its sign where a mean's would underflow.
    """
    return perturb(start, lambda z: -loss(z), box(x, eps), steps=steps, step_size=step_size)


def margin(logits: Tensor, classes: Tensor) -> Tensor:
    """max_{j ≠ c} f_j − f_c, float [B]: positive where c is not the prediction."""
    others = logits.scatter(1, classes[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, classes[:, None])[:, 0]


def snapshots(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: Sequence[int] = STEPS,
              step_size: float = 0.01) -> dict[int, Tensor]:
    """Untargeted PGD on the cross-entropy from x itself: x' by number of steps, each the same as from a run that ends there.

    Args:
        model: pixels to logits.
        x, y: float [B, C, H, W] in [0, 1], int64 [B].
        steps: when to look, increasing.

    Raises:
        ValueError: numbers of steps that do not increase.
    """
    if list(steps) != sorted(set(steps)) or not steps or steps[0] < 0:
        raise ValueError(f"numbers of steps must increase from 0 or more, not {tuple(steps)}")
    found, z, done = {}, x, 0
    for count in steps:
        z = ascend(lambda z: F.cross_entropy(model(z), y, reduction="sum"), x, z, eps=eps, steps=count - done,
                   step_size=step_size)
        found[count], done = z, count
    return found


def restarted(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int, step_size: float, restarts: int,
              rng: np.random.Generator) -> Tensor:
    """x' of as many runs from uniform points of the ball, of which each image keeps the one with the largest margin."""
    best, height = x, torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    for _ in range(restarts):
        noise = torch.from_numpy(rng.uniform(-eps, eps, tuple(x.shape))).to(x)
        z = ascend(lambda z: F.cross_entropy(model(z), y, reduction="sum"), x, (x + noise).clamp(0, 1), eps=eps,
                   steps=steps, step_size=step_size)
        with torch.no_grad():
            found = margin(model(z), y)
        better = found > height
        best, height = torch.where(better[:, None, None, None], z, best), torch.where(better, found, height)
    return best
