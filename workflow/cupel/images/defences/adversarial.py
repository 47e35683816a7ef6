"""Perturbations of images by projected gradient descent, the inner loop of SAU, NPD and PBE.

    δ ← Π( δ − η · sign ∇_δ L(δ) )

L is whatever the defence wants to be small, e.g. minus the cross-entropy; Π keeps δ in a ball around 0.
"""

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


def perturb(delta: Tensor, loss: Callable[[Tensor], Tensor], project: Callable[[Tensor], Tensor], *, steps: int,
            step_size: float, signed: bool = True, until: Callable[[Tensor], bool] | None = None) -> Tensor:
    """Projected gradient descent on perturbations; gradients of weights are left alone.

    Args:
        delta: float [B, C, H, W], where to start.
        loss: δ to a scalar that is to become small.
        project: Π.
        steps, step_size: η and how often.
        signed: step along the sign of the gradient, else along the gradient.
        until: stops early once it holds for the new δ.

    Returns:
        δ, detached, as `delta`.
    """
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(delta), delta)
        delta = project(delta.detach() - step_size * (gradient.sign() if signed else gradient))
        if until and until(delta):
            break
    return delta.detach()
