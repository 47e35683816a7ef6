"""Targeted attacks of least ε, and the interpretability sneaking attack (proper_interpretability SPEC 3.3, 3.4).

    least ε:  min over x'  m(x'),                    m = max( max_{j≠t'} f_j − f_t', −κ )
    ISA:      min over x'  m(x') + γ D(x, x')        in the ball of ε = p · (least ε of that image)

    x' ← Π ( x' − 0.2 ε clip(1000 ∇, −1, 1) ), ten steps from x;  ∇ of the mean over the N images, hence a factor 1/N

ε and γ come from binary searches of ten rounds, each image's own: the smallest ε and the largest γ at which the image
is still taken for t'. A network whose maps are robust makes the attacker pay for a small D with a large ε.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cupel.robust.attacks import box, margin
from cupel.robust.discrepancy import classes_of, discrepancy, lower_bound
from cupel.robust.maps import interpret
from cupel.robust.models import GapClassifier
from cupel.training import adversarial

KAPPA, ROUNDS = 0.1, 10  # κ, and rounds of the searches


def descend(loss: Callable[[Tensor], Tensor], x: Tensor, eps: Tensor, *, steps: int = 10) -> Tensor:
    """The ten steps of both attacks from x [B, C, H, W], in balls of ε [B] each: x'."""
    eps = eps[:, None, None, None]
    project = box(x, eps)
    return adversarial.descend(x, loss, lambda z, gradient, _: project(z - 0.2 * eps * (1000 * gradient).clamp(-1, 1)),
                               steps=steps)


def _search(rises: Callable[[Tensor], Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds in [0, 1], float [B] each, of where values shall no longer rise; the search begins at `value`."""
    low, high = torch.zeros_like(value), torch.ones_like(value)
    for _ in range(ROUNDS):
        with torch.no_grad():
            up = rises(value)
        low, high = torch.where(up, value, low), torch.where(up, high, value)
        middle = (low + high) / 2
        value = torch.where(up, torch.minimum(2 * value, middle), middle)
    return low, high


def least_epsilon(model: nn.Module, x: Tensor, target: Tensor, *, population: int | None = None) -> tuple[Tensor, Tensor]:
    """x' of the smallest ε found at which each image is taken for its target, and ε, float [B]: 1 if it never was.

    Args:
        model: pixels to logits.
        x, target: float [B, C, H, W] in [0, 1], int64 [B].
        population: N of the step rule, where the images are attacked in several batches; None: B.
    """
    def attack(eps: Tensor) -> Tensor:
        return descend(lambda z: margin(model(z), target).clamp(min=-KAPPA).sum() / (population or len(x)), x, eps)

    _, high = _search(lambda eps: ~(margin(model(attack(eps)), target) < 0), x.new_full((len(x),), 0.05))
    return attack(high), high


def sneak(model: GapClassifier, x: Tensor, true: Tensor, target: Tensor, eps: Tensor, *, scope: str = "two",
          norm: str = "l1", kind: str = "cam", population: int | None = None) -> tuple[Tensor, Tensor]:
    """ISA in balls of given radius: x', and γ, float [B]: 0 for an image that was never taken for its target with γ > 0.

    Args:
        model, x, true, target, population: see :func:`least_epsilon`.
        eps: float [B].
        scope, norm, kind: of D; see `discrepancy.classes_of`, `discrepancy.discrepancy` (l2 without its root), and
            `maps.interpret`. For `repr` the scope has no effect.
    """
    classes = classes_of(scope, true, target, model.head.out_features)
    clean = interpret(model, x, classes, kind).detach()

    def attack(gamma: Tensor) -> Tensor:
        def loss(z: Tensor) -> Tensor:
            apart = discrepancy(clean, interpret(model, z, classes, kind, differentiable=True), norm, squared=True)
            return (margin(model(z), target).clamp(min=-KAPPA) + gamma * apart).sum() / (population or len(x))

        return descend(loss, x, eps)

    low, _ = _search(lambda gamma: margin(model(attack(gamma)), target) < 0, torch.full_like(eps, 5e-5))
    return attack(low), low


@dataclass(frozen=True)
class Curves:
    """Normalised discrepancy against ε, per image."""

    discrepancy: np.ndarray  # float64 [P, B], for the least-ε attack and then for growing multiples of its ε
    eps: np.ndarray  # float64 [P, B], realised max |x' − x|
    kept: np.ndarray  # bool [P, B], the attack worked and the clean network did not prefer the target

    def monotone(self) -> np.ndarray:
        """Least discrepancy up to each ε, float64 [P, B]: a larger ball contains the smaller one's x'."""
        return np.minimum.accumulate(np.where(self.kept, self.discrepancy, np.inf), axis=0)

    def summary(self) -> dict:
        """Mean discrepancy and normalised slope NS, as released.

            NS = (D_first − D_last) ε_first / ( (ε_last − ε_first) D_first )

        Images whose curve is flat are left out of both. Both sums are divided by the number of points (image, p); the
        mean of NS over images is `slope_per_image`. NaN where no image is left.
        """
        curve, column = self.monotone(), np.arange(self.kept.shape[1])
        first, last = self.kept.argmax(0), len(self.kept) - 1 - self.kept[::-1].argmax(0)
        begin, end = curve[first, column], curve[last, column]
        used = self.kept.any(0) & (begin != end)
        inside = self.kept & used
        count, images = int(inside.sum()), int(used.sum())
        if not count:
            return dict.fromkeys(("discrepancy", "slope", "slope_per_image"), float("nan"))
        near, far = self.eps[first, column][used], self.eps[last, column][used]
        slope = float((((begin[used] - end[used]) * near) / ((far - near) * begin[used])).sum())
        return {"discrepancy": float(curve[inside].sum()) / count, "slope": slope / count, "slope_per_image": slope / images}


def curves(model: GapClassifier, x: Tensor, true: Tensor, target: Tensor, *, multipliers: Sequence[float],
           scope: str = "two", norm: str = "l1", kind: str = "cam", population: int | None = None) -> Curves:
    """The whole of ISA: least-ε attack, sneaking attack (:func:`sneak`) at each multiple p of its ε, normalised discrepancies.

    Raises:
        ValueError: multipliers that do not increase.
    """
    if list(multipliers) != sorted(set(multipliers)):
        raise ValueError(f"multipliers must increase, not {tuple(multipliers)}")
    changed, eps = least_epsilon(model, x, target, population=population)
    options = {"scope": scope, "norm": norm, "kind": kind, "population": population}
    attacked = [changed] + [sneak(model, x, true, target, p * eps, **options)[0] for p in multipliers]
    classes = classes_of(scope, true, target, model.head.out_features)

    def maps(z: Tensor) -> Tensor:
        found = interpret(model, z, classes, kind).detach()
        return found[:, 0] if kind == "repr" else found  # channels take the place of classes

    clean = maps(x)
    apart = torch.stack([discrepancy(clean, maps(z), norm, normalised=True) for z in attacked])
    with torch.no_grad():
        behind = torch.stack([lower_bound(model(z), true, target) for z in (x, *attacked)])
    kept = (behind[1:] <= 0) & (behind[0] >= 0)
    realised = torch.stack([(z - x).abs().amax((1, 2, 3)) for z in attacked])
    return Curves(*(value.double().cpu().numpy() for value in (apart, realised)), kept.cpu().numpy())
