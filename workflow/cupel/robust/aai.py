"""Attack against interpretability, top-k (proper_interpretability SPEC 3.2).

    min over x'   Σ_{p in T} I_p(x', y),    T = the k largest cells of I(x, y)

It goes for the map of the true class and leaves the prediction to itself; what it did to the map is told by Kendall's
tau over the images whose prediction stayed.
"""

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor

from cupel.robust.attacks import ascend
from cupel.robust.maps import interpret
from cupel.robust.models import GapClassifier


def noise(draw: np.random.RandomState, x: Tensor, eps: float) -> Tensor:
    """U(−ε, ε) like the images x [n, C, H, W], drawn in the order of the released code (channels last)."""
    count, channels, height, width = x.shape
    return torch.from_numpy(draw.uniform(-eps, eps, (count, height, width, channels))).permute(0, 3, 1, 2).to(x)


def top_k(model: GapClassifier, x: Tensor, y: Tensor, start: Tensor, *, eps: float, k: int = 8, steps: int = 200,
          step_size: float = 0.01, kind: str = "cam") -> Tensor:
    """The attack: x', float [B, C, H, W]; the defaults are those of the released code.

    Args:
        x, y: float [B, C, H, W] in [0, 1], true classes int64 [B].
        start: x plus noise in the ball, e.g. of :func:`noise`; clipped to [0, 1] here.
        kind: a map with classes.

    Raises:
        ValueError: the map has no classes, or fewer than k cells.
    """
    if kind == "repr":
        raise ValueError("the representation has no map of the true class to attack: take cam, gradcam++ or ig")
    classes = y[:, None]
    clean = interpret(model, x, classes, kind).detach().flatten(1)
    if k > clean.shape[1]:
        raise ValueError(f"k = {k}, but the map has only {clean.shape[1]} cells")
    cells = clean.topk(k, dim=1).indices

    def loss(z: Tensor) -> Tensor:
        return -interpret(model, z, classes, kind, differentiable=True).flatten(1).gather(1, cells).sum()

    return ascend(loss, x, start.clamp(0, 1), eps=eps, steps=steps, step_size=step_size)


def agreement(model: GapClassifier, x: Tensor, changed: Tensor, y: Tensor, kind: str = "cam") -> tuple[np.ndarray, np.ndarray]:
    """How alike the maps of the true class are at x and `changed`, float [B, C, H, W] both.

    Returns:
        Kendall's tau-b between clean and attacked map, float64 [B], and where the prediction stayed, bool [B]. The value
        to report is the mean tau of the latter. For x' = x it is 1 (the released code says 0 at ε = 0, by convention).
    """
    clean, attacked = (interpret(model, z, y[:, None], kind).detach().flatten(1).double().cpu().numpy()
                       for z in (x, changed))
    with torch.no_grad():
        kept = (model(x).argmax(1) == model(changed).argmax(1)).cpu().numpy()
    return np.array([kendalltau(a, b).statistic for a, b in zip(clean, attacked, strict=True)]), kept


def overlap(first: np.ndarray, second: np.ndarray, k: int = 8) -> np.ndarray:
    """Share of the k largest cells that two maps have in common, float64 [n], of maps [n, ...] each
    (proper_interpretability SPEC 3.6).

    The released code cannot run and would divide by the size of the map; this is what it is named after.
    """
    def largest(maps: np.ndarray) -> np.ndarray:
        return np.argsort(-maps.reshape(len(maps), -1), 1, kind="stable")[:, :k]

    return np.array([len(set(a) & set(b)) / k for a, b in zip(largest(first), largest(second), strict=True)])
