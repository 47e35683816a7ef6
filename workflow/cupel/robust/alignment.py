"""Perceptual alignment: what a network looks at (proper_interpretability SPEC 8, E12).

The paper shows inputs that maximise neurons, but its repository has no code for them; the procedure is ours:

    x ← clip( x + η ∇ h_d(x) / ‖∇ h_d(x)‖₂ ),    h_d(x) = mean_ij A_dij(x),  from a test image, no ball around it

Where features mean something to people, so do the images; else they are patterns of noise.
"""

import torch
from torch import Tensor

from cupel.robust.models import GapClassifier, SameConv2d


def maximise(model: GapClassifier, start: Tensor, neurons: Tensor, *, steps: int = 100, step_size: float = 0.5) -> Tensor:
    """Images that make neurons of the penultimate layer large.

    Args:
        model: the network.
        start: float [B, C, H, W] in [0, 1].
        neurons: int64 [B], d of each image.
        steps, step_size: how often, η in the l2 norm of an image.

    Returns:
        float [B, C, H, W] in [0, 1].
    """
    x = start
    for _ in range(steps):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(model.features(x).gather(1, neurons[:, None]).sum(), x)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        x = (x.detach() + step_size * gradient / length).clamp(0, 1)
    return x.detach()


def first_filters(model: GapClassifier) -> Tensor:
    """Weights of the first convolution, float [d, C, k, k], detached."""
    first = next(layer for layer in model.modules() if isinstance(layer, SameConv2d))
    return first.weight.detach().clone()
