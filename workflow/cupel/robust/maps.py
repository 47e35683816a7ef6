"""Interpretation maps I(x, c) (proper_interpretability SPEC 2.2).

    CAM         I_ij(x, c) = Σ_d W_dc A_dij(x)                    mean over ij = f_c(x), exactly
    GradCAM++   the same with max(W, 0), to which it comes for a linear head
    IG          x ⊙ 1/m Σ_{k=1..m} ∂f_c(z_k)/∂z,  z_k = k/m · x,  on the network with softplus for ReLU
    repr        A(x), which has no class

CAM is neither rectified nor scaled nor enlarged. IG has softplus because an attack on it needs second derivatives.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.registry import one_of
from cupel.robust.models import GapClassifier

KINDS = ("cam", "gradcam++", "ig", "repr")


def path_gradients(function: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, points: int, *,
                   differentiable: bool) -> Tensor:
    """Integrated gradients along a straight path, right Riemann sum, float [B, S, C, H, W].

        (end − start) ⊙ 1/m Σ_{k=1..m} ∂F(z_k)/∂z,   z_k = start + k/m (end − start)

    Args:
        function: F, from [B, C, H, W] to [B, S]; each sample's value must depend on that sample alone.
        start, end: float [B, C, H, W].
        differentiable: keep the graph, so that the result can be differentiated once more.
    """
    total = None
    for k in range(1, points + 1):
        with torch.enable_grad():
            z = (start + (end - start) * (k / points)).requires_grad_()
            values = function(z).sum(0)
            gradients = torch.stack([torch.autograd.grad(value, z, create_graph=differentiable, retain_graph=True)[0]
                                     for value in values], 1)
        total = gradients if total is None else total + gradients
    return (end - start)[:, None] * total / points


def integrated_gradients(model: GapClassifier, x: Tensor, classes: Tensor, *, points: int = 100,
                         differentiable: bool = False) -> Tensor:
    """IG from black to x, float [B, S, C, H, W], of classes int64 [B, S]; m = 100 points as released."""
    return path_gradients(lambda z: model(z, F.softplus).gather(1, classes), torch.zeros_like(x), x, points,
                          differentiable=differentiable)


def interpret(model: GapClassifier, x: Tensor, classes: Tensor, kind: str = "cam", *,
              differentiable: bool = False) -> Tensor:
    """Maps of the wanted classes.

    Args:
        x: float [B, C, H, W] in [0, 1].
        classes: int64 [B, S].
        kind: one of `KINDS`.
        differentiable: see :func:`path_gradients`; the maps other than `ig` always are.

    Returns:
        float [B, S, h, w]; [B, S, C, H, W] for `ig`; [B, 1, d, h, w] for `repr`, whatever the classes.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "ig":
        return integrated_gradients(model, x, classes, differentiable=differentiable)
    hidden = model.hidden(x)
    if kind == "repr":
        return model.feature_map(hidden)[:, None]
    one_of("map", kind, KINDS)
    return pick(model.class_maps(hidden, model.head.weight.clamp(min=0) if kind == "gradcam++" else None), classes)


def pick(maps: Tensor, classes: Tensor) -> Tensor:
    """Of maps of all classes [B, K, h, w] those of `classes`, int64 [B, S]: float [B, S, h, w]."""
    return maps.gather(1, classes[:, :, None, None].expand(-1, -1, *maps.shape[2:]))
