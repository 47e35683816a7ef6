"""Fine-tuning with sharpness-aware minimisation: FT-SAM (Zhu et al., ICCV 2023) and its plain form; fst SPEC 7.

    min over w of  max over ‖T_w⁻¹ ε‖₂ ≤ ρ  of  L(w + ε),          ε = ρ · T_w² g / ‖T_w g‖₂,   g = ∇L(w)

Adaptive: T_w = diag|w|, so that large weights may move further; plain: T_w = 1. The gradient at w + ε is used for the
step from w. Running statistics of BatchNorm move in the first of the two passes only, and the climb does not count
towards momentum. Drawing a class-balanced clean set, as FT-SAM's code does, is the budget's matter.
"""

import math

import torch
from torch import Tensor, nn

from cupel.images.defences.base import defence
from cupel.images.defences.passes import train


def climb(weights: list[Tensor], gradients: list[Tensor], rho: float, adaptive: bool) -> list[Tensor]:
    """ε for each weight tensor; the norm is taken over all of them together."""
    scales = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
    norm = torch.stack([(s * g).norm() for s, g in zip(scales, gradients, strict=True)]).norm()
    return [rho / (norm + 1e-12) * s**2 * g for s, g in zip(scales, gradients, strict=True)]


def sharpness_aware(model: nn.Module, rho: float, adaptive: bool, cosine: tuple[float, int] | None = None):
    """A step for `cupel.training.engine.fit`.

    Args:
        model: the network that is trained.
        rho, adaptive: see `climb`.
        cosine: (lr, T): the learning rate of batch t is lr·(1 + cos(πt/T))/2, which rises again after T batches. None
            leaves it to the recipe.
    """
    norms = [(module, module.momentum) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def step(optimizer, closure):
        (group,) = optimizer.param_groups
        if cosine:
            # kept in the optimiser, so that a continued run goes on from there
            batch = group.get("batch", 0)
            group["lr"] = cosine[0] * (1 + math.cos(math.pi * batch / cosine[1])) / 2
            group["batch"] = batch + 1
        optimizer.zero_grad(set_to_none=True)
        loss, logits = closure()
        loss.backward()
        weights = [p for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            here = [p.clone() for p in weights]
            for p, epsilon in zip(weights, climb(weights, [p.grad for p in weights], rho, adaptive), strict=True):
                p.add_(epsilon)
        optimizer.zero_grad(set_to_none=True)
        for module, _ in norms:
            module.momentum = 0.0
        closure()[0].backward()
        for module, momentum in norms:
            module.momentum = momentum
        with torch.no_grad():
            for p, w in zip(weights, here, strict=True):
                p.copy_(w)
        optimizer.step()
        return loss.detach(), logits.detach()

    return step


@defence("ft_sam")
def ft_sam(victim, budget, rng, *, rho=2.0, label_smoothing=0.1, lr=0.01, epochs=100, batch_size=256, momentum=0.9,
           weight_decay=5e-4, t_max=100, schedule_per="epoch"):
    """FT-SAM, adaptive.

    Args:
        rho: ρ; BackdoorBench's files say 8 for GTSRB and Tiny-ImageNet, which its parser default of 2 overrides.
        label_smoothing: share of a label that goes to the other K − 1 classes in equal parts, so that the true class has
            1 less that; torch spreads its smoothing over all K (ims SPEC 10.14).
        t_max: period of the cosine.
        schedule_per: what the period counts: `epoch`, or `batch` as in the released code, where the learning rate
            falls and rises again as soon as there are more than t_max batches.
    """
    model = budget.copy_of(victim)
    per_batch = schedule_per == "batch"
    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=weight_decay,
                           label_smoothing=label_smoothing * budget.classes / (budget.classes - 1),
                           schedule="constant" if per_batch else "cosine", t_max=t_max)
    step = sharpness_aware(model, rho, True, (lr, t_max) if per_batch else None)
    return model, train(model, budget, recipe, rng, step=step, title="ft_sam")


@defence("sam_ft")
def sam_ft(victim, budget, rng, *, rho=0.05, lr=0.01, epochs=10, batch_size=128, momentum=0.9):
    """Plain SAM in the tuning procedure of fst SPEC 2 (no weight decay, cosine to zero).

    This is our reading of the "FT+SAM" that FST compares with: no source for it could be read, only a recollection
    (fst SPEC 7), so every value is ours: ρ = 0.05 is SAM's own default, the rest is FST's.
    """
    model = budget.copy_of(victim)
    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=0.0)
    return model, train(model, budget, recipe, rng, step=sharpness_aware(model, rho, False), title="sam_ft")
