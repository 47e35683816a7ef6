"""Adversarial Neuron Pruning (Wu & Wang, NeurIPS 2021), as in the IMS authors' BackdoorBench fork; ims SPEC 7.

    min over w in [0, 1]^N    α·CE(w) + (1 − α)·max over |δ|, |ξ| ≤ ε of CE(w + δ on γ, 1 + ξ on β)

w has one entry per BatchNorm channel: channels whose disturbance hurts most are driven to zero. The inner maximum is
one sign step from a random start; BatchNorm runs in train mode meanwhile. Then γ of every channel with w at or below a
threshold is set to zero in the victim, for the largest threshold that keeps the accuracy.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from cupel.images.defences.base import defence
from cupel.images.defences.masks import MaskedBatchNorms, accuracy, augmented
from cupel.rng import derive, torch_rng
from cupel.training.engine import autocast, upload


def worst_noise(masked: MaskedBatchNorms, x: torch.Tensor, y: torch.Tensor, offset: torch.Tensor, shift: torch.Tensor,
                *, eps: float, steps: int, projected: bool, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sign ascent on the cross-entropy from (offset, shift), both [N], with steps of eps/steps."""
    for _ in range(steps):
        noise = [offset.detach().requires_grad_(), shift.detach().requires_grad_()]
        with autocast(precision, x.device):
            loss = F.cross_entropy(masked(x, *noise), y)
        moved = [value.detach() + eps / steps * grad.sign()
                 for value, grad in zip(noise, torch.autograd.grad(loss, noise), strict=True)]
        offset, shift = [value.clamp(-eps, eps) for value in moved] if projected else moved
    return offset, shift


@defence("anp")
def anp(victim, budget, rng, *, eps=0.4, steps=1, alpha=0.2, lr=0.01, momentum=0.9, iterations=2000, batch_size=256,
        threshold_max=0.9, threshold_step=0.05, tolerance=0.1, validation=0.1, projected=True, augmented_validation=False,
        reference_accuracy=None):
    """Adversarial neuron pruning.

    Args:
        eps: ε.
        steps: sign steps of ε/steps each.
        alpha: α.
        lr, momentum: of SGD on w.
        iterations: steps on w, each on `batch_size` augmented samples drawn with replacement.
        threshold_max, threshold_step: thresholds 0, step, ..., max.
        tolerance: the largest threshold with |accuracy − reference| / reference below it is taken; if there is none,
            the victim is returned as it is.
        validation: share of each class kept apart for the accuracies.
        projected: keep the noise within ε after the step. The released code does not, so that there a random start of
            up to ε and a step of ε add up to 2ε.
        augmented_validation: crop and flip the validation images, once for each accuracy, as the released code does.
        reference_accuracy: None: the victim's own accuracy on the validation part. The released code compares with the
            victim's accuracy on the TEST set, a leak that is not reproduced here; `anp~leak` passes that number (`victim:acc`).

    Raises:
        ValueError: the network has no BatchNorm.
    """
    training, held = budget.split(validation, rng)
    seed = int(rng.integers(2**62))
    masked = MaskedBatchNorms(budget.copy_of(victim), "anp").to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD([masked.mask], lr, momentum)
    images = upload(training.images, budget.device)
    labels = torch.as_tensor(training.labels, device=images.device)
    order, noise = torch_rng(seed, "batches"), torch_rng(seed, "noise")
    torch.manual_seed(derive(seed, "dropout"))
    losses = torch.zeros(2, device=images.device)
    work = budget.resume(mask=masked.mask, optimizer=optimizer, batches=order, noise=noise, losses=losses,
                         dropout=torch.default_generator)
    for _ in work.each(range(iterations), "iterations"):
        index = torch.randint(len(labels), (batch_size,), generator=order).to(images.device)
        x, y = augmented(images, index, budget, order), labels[index]
        start = (eps * (2 * torch.rand(2, masked.channels.total, generator=noise) - 1)).to(images.device)
        found = worst_noise(masked, x, y, *start, eps=eps, steps=steps, projected=projected, precision=budget.precision)
        with autocast(budget.precision, images.device):
            robust, natural = F.cross_entropy(masked(x, *found), y), F.cross_entropy(masked(x), y)
        optimizer.zero_grad(set_to_none=True)
        (alpha * natural + (1 - alpha) * robust).backward()
        optimizer.step()
        masked.clamp()
        losses.copy_(torch.stack([natural, robust]).detach())

    def measured(model):
        if not augmented_validation:
            return accuracy(model, held)
        moved = augmented(torch.from_numpy(held.images), torch.arange(len(held)), held, order)
        return accuracy(model, replace(held, images=(moved * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()))

    best = budget.copy_of(victim).eval()
    reference = measured(best) if reference_accuracy is None else reference_accuracy
    history = [{"stage": "mask", "loss_natural": float(losses[0]), "loss_robust": float(losses[1]),
                "reference_accuracy": reference}]
    for k in range(round(threshold_max / threshold_step) + 1):
        threshold = round(k * threshold_step, 10)
        candidate, share = masked.pruned(victim, masked.mask > threshold)
        found = measured(candidate)
        accepted = reference > 0 and abs(found - reference) / reference < tolerance
        best = candidate if accepted else best
        history.append({"stage": "threshold", "threshold": threshold, "acc": found, "accepted": accepted, "pruned": share})
    return best, history
