"""Training for robust interpretation, and what it is compared with (proper_interpretability SPEC 2.5, 2.6, 6).

    R2(x, x') = ‖I(x,y) − I(x',y)‖₁ + Σ_{j≠y} s_j ‖I(x,j) − I(x',j)‖₁,   s = softmax of f(x') over the wrong classes
    R1(x, x') = ‖I(x,y) − I(x',y)‖₁                                      I: CAM; sums over space, not means

The methods are the rows of `METHODS`; x' is found by PGD in the ball of ε_t. IG is that of the cross-entropy along the path
from x to x', 5 points, on the network with its ReLUs. s is not detached, neither are the clean maps in the outer loss; no
gradient flows through the search for x'.
"""

import contextlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.rng import torch_rng
from cupel.robust.attacks import ascend
from cupel.robust.discrepancy import distances
from cupel.robust.maps import path_gradients
from cupel.robust.models import GapClassifier
from cupel.training.hook import Hook


@dataclass(frozen=True)
class Ramp:
    """ε by training step, counted from 0: zero up to `begin`, linear to `end`, then `eps`.

    With begin = end = -1 it is `eps` from the first step on (the timing runs).
    """

    eps: float
    begin: int
    end: int

    def __call__(self, step: int) -> float:
        if step > self.end:
            return self.eps
        return self.eps * max(step - self.begin, 0) / max(self.end - self.begin, 1)


class View:
    """What a network makes of pixels x, computed when asked for. A frozen view is a constant for every gradient."""

    def __init__(self, model: GapClassifier, x: Tensor, frozen: bool = False):
        self.model, self.x = model, x
        self.graph = torch.no_grad if frozen else contextlib.nullcontext

    @cached_property
    def hidden(self) -> Tensor:
        """Of which logits and maps are made."""
        with self.graph():
            return self.model.hidden(self.x)

    @cached_property
    def logits(self) -> Tensor:
        """f(x), float [B, K]."""
        with self.graph():
            return self.model.head(self.model.features(self.hidden))

    @cached_property
    def cams(self) -> Tensor:
        """Class activation maps, float [B, K, h, w]."""
        with self.graph():
            return self.model.class_maps(self.hidden)


def _two_class(apart: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Distances of the maps of all classes [B, K] to their value at y plus their s-weighted mean elsewhere, [B]."""
    # for s the released code divides the masked softmax by its sum, which is 0/0 for a network that is sure of y
    weights = logits.scatter(1, y[:, None], -torch.inf).softmax(1)
    return apart.gather(1, y[:, None])[:, 0] + (weights * apart).sum(1)


# Penalties, float [B], of the network, the views of x and x', the labels, and whether to follow the released code.

def divergence(model: GapClassifier, clean: View, changed: View, y: Tensor, as_released: bool) -> Tensor:
    """KL(p(x) ‖ p(x'))."""
    before, after = clean.logits.log_softmax(1), changed.logits.log_softmax(1)
    return (before.exp() * (before - after)).sum(1)


def one_class(model: GapClassifier, clean: View, changed: View, y: Tensor, as_released: bool) -> Tensor:
    """R1."""
    return distances(clean.cams, changed.cams).gather(1, y[:, None])[:, 0]


def two_class(model: GapClassifier, clean: View, changed: View, y: Tensor, as_released: bool) -> Tensor:
    """R2."""
    return _two_class(distances(clean.cams, changed.cams), changed.logits, y)


def _loss_attribution(model: GapClassifier, clean: View, changed: View, y: Tensor, as_released: bool) -> Tensor:
    """IG of the cross-entropy from x to x', float [B, 1, C, H, W]."""
    found = path_gradients(lambda z: F.cross_entropy(model(z), y, reduction="none")[:, None], clean.x, changed.x, 5,
                           differentiable=True)
    # The released code attributes the mean over the batch and averages the norms over the batch once more.
    return found / len(y) if as_released else found


def attribution(model: GapClassifier, clean: View, changed: View, y: Tensor, as_released: bool) -> Tensor:
    """‖IG‖₁; as released over B."""
    return _loss_attribution(model, clean, changed, y, as_released).abs().sum((1, 2, 3, 4))


def two_class_attribution(model: GapClassifier, clean: View, changed: View, y: Tensor, as_released: bool) -> Tensor:
    """R2 of the attributions of the logits along the path; as released both terms hold that of the loss, over B.

    There no class enters the attribution, the weights s sum to 1, and the term of the true class is summed over colours
    before its absolute value is taken.
    """
    if as_released:
        found = _loss_attribution(model, clean, changed, y, True)
        return found.abs().sum((1, 2, 3, 4)) + found.sum(2).abs().sum((1, 2, 3))
    found = path_gradients(model, clean.x, changed.x, 5, differentiable=True)
    return _two_class(found.abs().flatten(2).sum(2), changed.logits, y)


class Method(NamedTuple):
    """A row of the table: whether CE is taken at x', the penalty, its default weight, what x' maximises."""

    adversarial: bool
    penalty: object
    weight: float
    search: str


METHODS = {                                                         # outer loss                x' maximises
    "normal": Method(False, None, 0.0, "none"),                     # CE(x)
    "adv": Method(True, None, 0.0, "loss"),                         # CE(x')                    CE(x')
    "trades": Method(False, divergence, 1.0, "loss"),               # CE(x) + KL(p(x) ‖ p(x'))  KL
    "int": Method(False, two_class, 0.01, "loss"),                  # CE(x) + γ R2              R2
    "intone": Method(False, one_class, 0.01, "loss"),               # CE(x) + γ R1              R1
    "intadv": Method(True, two_class, 0.01, "loss"),                # CE(x') + γ R2             CE(x') + γ R2
    "int2": Method(False, two_class, 0.01, "ce"),                   # CE(x) + γ R2              CE(x')
    "int2adv": Method(True, two_class, 0.01, "ce"),                 # CE(x') + γ R2             CE(x')
    "ig": Method(False, attribution, 1.0, "loss"),                  # CE(x) + ‖IG‖₁             ‖IG‖₁ (IG-NORM)
    "igsum": Method(True, attribution, 1.0, "loss"),                # CE(x') + ‖IG‖₁            CE(x') + ‖IG‖₁ (IG-SUM-NORM)
    "intig": Method(False, two_class_attribution, 0.01, "loss"),    # CE(x) + γ R2 of IG        R2 of IG
    "intigadv": Method(True, two_class_attribution, 0.01, "loss"),  # CE(x') + γ R2 of IG       CE(x') + γ R2 of IG
}


class Objective(Hook):
    """An objective of the table, for `fit(..., objective=o, hook=o)`.

    It is a hook too because ε and the random starts depend on the step: the engine tells it the epoch, also in a run
    that continues from a checkpoint. The logits that it returns for the history are those under the cross-entropy, so
    that the accuracy of `adv`, `intadv`, `int2adv`, `igsum` and `intigadv` is that at x'.

    Args:
        method: a key of `METHODS`.
        inner_steps, step_size: PGD steps and α, which does not shrink with ε (40 x 0.01 on MNIST).
        seed: of the stream `inner` that draws the start x + U(−ε, ε).
        weight: γ, or the weight of KL or IG; None: 0.01 for the Int family, else 1.
        as_released: IG penalties as the released code computes them (over the batch size; `intig` without classes),
            else as the formula says.
    """

    def __init__(self, method: str, *, ramp: Ramp, inner_steps: int, step_size: float, steps_per_epoch: int, seed: int,
                 weight: float | None = None, as_released: bool = True):
        self.method = METHODS[method]
        self.weight = self.method.weight if weight is None else weight
        self.ramp, self.inner_steps, self.step_size = ramp, inner_steps, step_size
        self.steps_per_epoch, self.seed, self.as_released = steps_per_epoch, seed, as_released
        self.step = self.generator = None

    def epoch(self, number: int) -> None:
        """Set the step, and the stream of the random starts, to the beginning of an epoch."""
        self.step = number * self.steps_per_epoch
        self.generator = torch_rng(self.seed, "inner", number)

    def __call__(self, model: GapClassifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and logits of a batch; counts one step.

        Raises:
            RuntimeError: no epoch has begun, because the objective was not given to `fit` as hook.
        """
        if self.step is None:
            raise RuntimeError("the objective does not know its step: use fit(..., objective=o, hook=o)")
        eps = self.ramp(self.step)
        self.step += 1
        if eps == 0 or self.method.search == "none":  # x' = x: every penalty and its gradient vanish
            logits = model(x)
            return F.cross_entropy(logits, y), logits
        changed = self.worst(model, x, y, eps)
        loss, logits = self.losses(model, View(model, x), View(model, changed), y)
        return loss.mean(), logits

    def losses(self, model: GapClassifier, clean: View, changed: View, y: Tensor) -> tuple[Tensor, Tensor]:
        """Outer loss of every sample, [B], and the logits under its cross-entropy."""
        logits = changed.logits if self.method.adversarial else clean.logits
        loss = F.cross_entropy(logits, y, reduction="none")
        if self.method.penalty:
            loss = loss + self.weight * self.method.penalty(model, clean, changed, y, self.as_released)
        return loss, logits

    def worst(self, model: GapClassifier, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """The inner point x', float [B, C, H, W], detached."""
        clean = View(model, x, frozen=True)  # only the gradient in x' counts here

        def loss(z: Tensor) -> Tensor:
            if self.method.search == "ce":
                return F.cross_entropy(model(z), y, reduction="sum")
            return self.losses(model, clean, View(model, z), y)[0].sum()

        noise = torch.rand(x.shape, generator=self.generator, dtype=x.dtype).to(x.device)
        start = (x + eps * (2 * noise - 1)).clamp(0, 1)
        return ascend(loss, x, start, eps=eps, steps=self.inner_steps, step_size=self.step_size)
