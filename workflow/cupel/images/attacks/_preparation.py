"""What attacks share that compute their trigger beforehand."""

import copy

from torch import nn


def share(count: int, smaller: float) -> int:
    """The share `smaller` of `count` units of work (steps, epochs), at least one."""
    return max(1, round(count * smaller))


def frozen(model: nn.Module, device: str) -> nn.Module:
    """A copy of `model` on `device`, in eval mode and without gradients of its weights; `model` stays as it is."""
    return copy.deepcopy(model).to(device).eval().requires_grad_(False)
