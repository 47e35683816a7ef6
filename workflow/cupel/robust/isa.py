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
from cupel.robust.discrepancy import classes_of, discrepancy
from cupel.robust.maps import interpret
from cupel.robust.models import GapClassifier


def descend(loss: Callable[[Tensor], Tensor], x: Tensor, eps: Tensor, *, steps: int = 10, fraction: float = 0.2,
            gain: float = 1000.0) -> Tensor:
    """The ten steps of both attacks.

    Args:
        loss: x' to a scalar.
        x: float [B, C, H, W], centre of the balls and start.
        eps: float [B], ε of each image.
        steps, fraction, gain: 10, 0.2 and 1000 as released.

    Returns:
        x', detached.
    """
    eps = eps[:, None, None, None]
    project, z = box(x, eps), x
    for _ in range(steps):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(z), z)
        z = project(z.detach() - fraction * eps * (gain * gradient).clamp(-1, 1))
    return z.detach()


def least_epsilon(model: nn.Module, x: Tensor, target: Tensor, *, kappa: float = 0.1, rounds: int = 10,
                  population: int | None = None) -> tuple[Tensor, Tensor]:
    """The smallest ε found at which each image is taken for its target.

    Args:
        model: pixels to logits.
        x, target: float [B, C, H, W] in [0, 1], int64 [B].
        kappa: κ; 0.1 as released.
        rounds: of the binary search, which begins at 0.05; 10 as released.
        population: N of the step rule, where the images are attacked in several batches; None: B.

    Returns:
        x', and ε float [B]: 1 for an image that was never taken for its target.
    """
    count = population or len(x)

    def attack(eps: Tensor) -> Tensor:
        return descend(lambda z: margin(model(z), target).clamp(min=-kappa).sum() / count, x, eps)

    low, high = torch.zeros(len(x), dtype=x.dtype, device=x.device), torch.ones(len(x), dtype=x.dtype, device=x.device)
    eps = torch.full_like(low, 0.05)
    for _ in range(rounds):
        with torch.no_grad():
            taken = margin(model(attack(eps)), target) < 0
        low, high = torch.where(taken, low, eps), torch.where(taken, eps, high)
        middle = (low + high) / 2
        eps = torch.where(taken, middle, torch.minimum(2 * eps, middle))
    return attack(high), high


def sneak(model: GapClassifier, x: Tensor, true: Tensor, target: Tensor, eps: Tensor, *, scope: str = "two",
          norm: str = "l1", kind: str = "cam", kappa: float = 0.1, rounds: int = 10,
          population: int | None = None) -> tuple[Tensor, Tensor]:
    """ISA in balls of given radius.

    Args:
        model: the network.
        x, true, target: float [B, C, H, W] in [0, 1], int64 [B] each.
        eps: float [B].
        scope, norm, kind: of D; see `discrepancy.classes_of`, `discrepancy.discrepancy` (l2 without its root), and
            `maps.interpret`. For `repr` the scope has no effect.
        kappa, rounds, population: see :func:`least_epsilon`; the search for γ begins at 5e-5.

    Returns:
        x', and γ float [B]: 0 for an image that was never taken for its target with γ > 0.
    """
    count = population or len(x)
    classes = classes_of(scope, true, target, model.head.out_features)
    clean = interpret(model, x, classes, kind).detach()

    def attack(gamma: Tensor) -> Tensor:
        def loss(z: Tensor) -> Tensor:
            apart = discrepancy(clean, interpret(model, z, classes, kind, differentiable=True), norm, squared=True)
            return (margin(model(z), target).clamp(min=-kappa) + gamma * apart).sum() / count

        return descend(loss, x, eps)

    low, high = torch.zeros_like(eps), torch.ones_like(eps)
    gamma = torch.full_like(eps, 5e-5)
    for _ in range(rounds):
        with torch.no_grad():
            taken = margin(model(attack(gamma)), target) < 0
        low, high = torch.where(taken, gamma, low), torch.where(taken, high, gamma)
        middle = (low + high) / 2
        gamma = torch.where(taken, torch.minimum(2 * gamma, middle), middle)
    return attack(low), low


@dataclass(frozen=True)
class Curves:
    """Normalised discrepancy against ε, per image.

    Attributes:
        discrepancy: float64 [P, B], for the least-ε attack and then for growing multiples of its ε.
        eps: float64 [P, B], realised max |x' − x|.
        kept: bool [P, B], the attack worked and the clean network did not prefer the target.
    """

    discrepancy: np.ndarray
    eps: np.ndarray
    kept: np.ndarray

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
    """The whole of ISA: least-ε attack, sneaking attack at each multiple of its ε, normalised discrepancies.

    Args:
        model, x, true, target, scope, norm, kind, population: see :func:`sneak`.
        multipliers: p, increasing; which ones the paper took is not known.

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
        behind = torch.stack([_behind(model(z), true, target) for z in (x, *attacked)])
    kept = (behind[1:] <= 0) & (behind[0] >= 0)
    realised = torch.stack([(z - x).abs().amax((1, 2, 3)) for z in attacked])
    return Curves(*(value.double().cpu().numpy() for value in (apart, realised)), kept.cpu().numpy())


def _behind(logits: Tensor, true: Tensor, target: Tensor) -> Tensor:
    """f_t − f_t', float [B]."""
    return (logits.gather(1, true[:, None]) - logits.gather(1, target[:, None]))[:, 0]
