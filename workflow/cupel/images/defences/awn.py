"""Adversarial Weight Masking (Chai & Chen, NeurIPS 2022), as in the IMS authors' BackdoorBench fork; ims SPEC 7.

Each epoch finds one universal perturbation d that changes the masked network's own predictions, then refines a mask M
over BatchNorm channels in [0, 1]:

    d:  one pass of gradient ascent on CE(f_M(x + d), argmax f_M(x)), then scaled to ‖d‖₁ ≤ the bound
    M:  min  α·CE(f_M(x), y) + (1 − α)·CE(f_M(clamp(x + d)), y) + γ_h·‖M‖₁

x and d are normalised images, as in the port; BatchNorm is in eval mode. The original method masks single weights. The
mask, soft, is multiplied into γ.
"""

import torch
import torch.nn.functional as F

from cupel.images.defences.base import defence
from cupel.images.defences.masks import MaskedBatchNorms, clamp_normalised, denormalise
from cupel.images.defences.passes import batches
from cupel.training.engine import autocast


def bounded(d: torch.Tensor, norm: float) -> torch.Tensor:
    """d scaled down to an L1 norm of at most `norm`."""
    return d * (norm / d.abs().sum()).clamp(max=1)


@defence("awn")
def awn(victim, budget, rng, *, lr=0.01, gamma=0.9, epochs=20, trigger_norm=1000.0, trigger_lr=10.0, alpha=0.9,
        l1_weight=1e-7, batch_size=256, clamp="pixel"):
    """Adversarial weight masking on BatchNorm channels.

    Args:
        lr: of SGD (no momentum) on M, times `gamma` after each epoch.
        epochs: of the alternation.
        trigger_norm: bound of ‖d‖₁, in normalised units.
        trigger_lr: of the gradient ascent on d, in normalised units.
        alpha: α.
        l1_weight: γ_h; 1e-7 is what the released program uses, 1e-8 what its configuration says.
        batch_size: of both passes of an epoch.
        clamp: `pixel`: x + d is clamped to valid images; `normalised`: to [0, 1] after normalisation, as released.

    Raises:
        ValueError: the network has no BatchNorm.
    """
    seed = int(rng.integers(2**62))
    model = budget.copy_of(victim).to(memory_format=torch.channels_last)
    masked = MaskedBatchNorms(model, "awn").eval()
    optimizer = torch.optim.SGD([masked.mask], lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    history = []
    work = budget.resume(mask=masked.mask, optimizer=optimizer, scheduler=scheduler, history=history)
    for number in work.each(range(epochs), "epochs"):
        height, width, colours = budget.images.shape[1:]
        d = torch.zeros(1, colours, height, width, device=budget.device, requires_grad=True)
        for x, _ in batches(budget, batch_size, seed, 2 * number):
            with autocast(budget.precision, x.device):
                with torch.no_grad():
                    own = masked(x).argmax(1)
                loss = F.cross_entropy(masked(denormalise(model, model.normalize(x) + d)), own)
            with torch.no_grad():
                d += trigger_lr * torch.autograd.grad(loss, d)[0]
        d = bounded(d.detach(), trigger_norm)

        total = torch.zeros(3, device=budget.device, dtype=torch.float64)
        for x, y in batches(budget, batch_size, seed, 2 * number + 1):
            triggered = denormalise(model, clamp_normalised(model, model.normalize(x) + d, clamp))
            with autocast(budget.precision, x.device):
                logits = masked(x)
                clean, robust = F.cross_entropy(logits, y), F.cross_entropy(masked(triggered), y)
            optimizer.zero_grad(set_to_none=True)
            (alpha * clean + (1 - alpha) * robust + l1_weight * masked.mask.abs().sum()).backward()
            optimizer.step()
            masked.clamp()
            total += torch.stack([clean.detach() * len(y), robust.detach() * len(y), (logits.argmax(1) == y).sum()])
        means = (total / len(budget)).tolist()
        history.append({"epoch": number + 1, "loss_clean": means[0], "loss_perturbed": means[1], "acc": means[2],
                        "lr": scheduler.get_last_lr()[0], "perturbation_l1": float(d.abs().sum()),
                        "mask_mean": float(masked.mask.detach().mean()), "mask_min": float(masked.mask.detach().min())})
        scheduler.step()
    return masked.finish(), history
