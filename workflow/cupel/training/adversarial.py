"""Gradient descent on points instead of weights: the loop of attacks on images, and of defences that train against them."""

from collections.abc import Callable

import torch
from torch import Tensor


def in_linf(delta: Tensor, bound: float) -> Tensor:
    """The nearest perturbations with |δ| ≤ bound in every entry, float [B, C, H, W]."""
    return delta.clamp(-bound, bound)


def in_l2(delta: Tensor, bound: float) -> Tensor:
    """The nearest perturbations with ‖δ_i‖₂ ≤ bound for every image, float [B, C, H, W]."""
    norms = delta.flatten(1).norm(dim=1)[:, None, None, None]
    return delta * (bound / norms.clamp(min=1e-12)).clamp(max=1)


def descend(point: Tensor, loss: Callable[[Tensor], Tensor], step: Callable[[Tensor, Tensor, int], Tensor], *, steps: int,
            until: Callable[[Tensor], bool] | None = None) -> Tensor:
    """Where a point ends, detached, that moves along gradients of a loss; gradients of weights are left alone.

    Args:
        loss: point to a scalar that is to become small.
        step: next point from the last one, the gradient there, and the number of the step.
        until: stops early once it holds for the new point.
    """
    for number in range(steps):
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(point), point)
        point = step(point.detach(), gradient, number)
        if until and until(point):
            break
    return point.detach()


def perturb(delta: Tensor, loss: Callable[[Tensor], Tensor], project: Callable[[Tensor], Tensor], *, steps: int,
            step_size: float, signed: bool = True, until: Callable[[Tensor], bool] | None = None) -> Tensor:
    """Projected gradient descent, δ ← Π( δ − η · sign ∇ L(δ) ), or along the gradient itself where it is not `signed`."""
    return descend(delta, loss, lambda at, gradient, _: project(at - step_size * (gradient.sign() if signed else gradient)),
                   steps=steps, until=until)
