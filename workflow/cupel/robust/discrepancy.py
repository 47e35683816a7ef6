"""Distances between interpretation maps, and the bound that no attack can get under (proper_interpretability SPEC 2.3, 2.4).

    D(x, x') = 1/|S| Σ_{c in S} ‖I(x, c) − I(x', c)‖_p,    S = {t}, {t, t'} or all classes

If x is predicted as t and x' as t' ≠ t, and the map is complete (CAM: its mean is f_c), then with S = {t, t'}, p = 1

    D / (hw) ≥ 1/2 ( f_t(x) − f_t'(x) ),

however x' was found. One class alone has no such bound: f_t may stay while f_t' rises.
"""

import torch
from torch import Tensor

from cupel.registry import one_of
from cupel.robust.maps import pick
from cupel.robust.models import GapClassifier

SCOPES = ("one", "two", "all")
NORMS = ("l1", "l2")


def classes_of(scope: str, true: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """S, int64 [B, 1 | 2 | K], of true and target classes, int64 [B].

    Raises:
        ValueError: a scope other than `one`, `two`, `all`.
    """
    one_of("scope", scope, SCOPES)
    if scope == "all":
        return torch.arange(num_classes, device=true.device).expand(len(true), -1)
    return true[:, None] if scope == "one" else torch.stack([true, target], 1)


def distances(first: Tensor, second: Tensor, norm: str = "l1", *, squared: bool = False) -> Tensor:
    """‖first − second‖_p of each map, float [B, S], of maps float [B, S, ...]. `squared` leaves out the root of l2.

    Raises:
        ValueError: a norm other than `l1`, `l2`.
    """
    one_of("norm", norm, NORMS)
    difference = (first - second).flatten(2)
    if norm == "l1":
        return difference.abs().sum(2)
    return difference.square().sum(2) if squared else difference.norm(dim=2)


def discrepancy(clean: Tensor, changed: Tensor, norm: str = "l1", *, squared: bool = False,
                normalised: bool = False) -> Tensor:
    """D of maps, float [B]; infinite or NaN where a clean map is constant and `normalised` is set.

    Args:
        clean, changed: float [B, S, ...] of the same classes, as from :func:`cupel.robust.maps.interpret`.
            For the normalised value of the representation give A itself, [B, d, h, w]: it is normalised per channel.
        norm: `l1` or `l2`.
        squared: l2 without its root; the attacks descend on that, reports use the root.
        normalised: divide each class's norm by max − min of that class's clean map.
    """
    found = distances(clean, changed, norm, squared=squared)
    if normalised:
        reference = clean.flatten(2)
        found = found / (reference.amax(2) - reference.amin(2))
    return found.mean(1)


def lower_bound(logits: Tensor, true: Tensor, target: Tensor) -> Tensor:
    """1/2 ( f_t(x) − f_t'(x) ), float [B], of clean logits [B, K]."""
    return (logits.gather(1, true[:, None]) - logits.gather(1, target[:, None]))[:, 0] / 2


def tightness(model: GapClassifier, x: Tensor, changed: Tensor, true: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of the proposition: two-class l1 CAM discrepancy over hw, and its bound; float [B] each.

    Args:
        x, changed: float [B, C, H, W], predicted as `true` and as `target`. Elsewhere the bound says nothing.
        true, target: int64 [B].
    """
    classes = torch.stack([true, target], 1)
    clean = model.class_maps(model.hidden(x))
    maps = pick(clean, classes), pick(model.class_maps(model.hidden(changed)), classes)
    return discrepancy(*maps) / clean[0, 0].numel(), lower_bound(clean.mean((2, 3)), true, target)
