"""Reconstructive Neuron Pruning (Li et al., ICML 2023), as in the IMS authors' BackdoorBench fork; ims SPEC 7.

1. Unlearn: a copy of the victim maximises the cross-entropy on clean data until it has forgotten the clean task.
2. Recover: its weights frozen, one mask entry per BatchNorm channel learns to minimise the cross-entropy again (train
   mode). Channels that are not needed for that, the backdoor's among them, keep low values.
3. Prune: γ of the victim's channels with a mask below a rising threshold is set to zero, while the accuracy holds.
"""

import math

import torch
import torch.nn.functional as F

from cupel.images.defences.base import Budget, defence
from cupel.images.defences.masks import MaskedBatchNorms, accuracy
from cupel.images.defences.passes import batches, stage, train
from cupel.rng import derive
from cupel.training.engine import Diverged, autocast

ATTEMPTS = 10  # learning rates tried: the first one, then a tenth of it, and so on


def unlearn(model, budget: Budget, seed: int, *, lr: float, momentum: float, weight_decay: float, epochs: int,
            threshold: float, batch_size: int) -> list[dict]:
    """Maximise the cross-entropy in place until the accuracy of an epoch's batches is at most `threshold`.

    Raises:
        Diverged: the loss is not finite.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    torch.manual_seed(derive(seed, "dropout"))
    model.train()
    history = []
    work = budget.resume(forgetful=model, optimizer=optimizer, scheduler=scheduler, forgotten=history,
                         dropout=torch.default_generator)
    for number in work.each(range(epochs), f"unlearn with {lr:g}"):
        if history and history[-1]["acc"] <= threshold:
            break
        total = torch.zeros(2, device=budget.device, dtype=torch.float64)
        for x, y in batches(budget, batch_size, seed, number):
            with autocast(budget.precision, x.device):
                logits = model(x)
                loss = F.cross_entropy(logits, y)
            optimizer.zero_grad(set_to_none=True)
            (-loss).backward()
            optimizer.step()
            total += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
        mean, share = (total / len(budget)).tolist()
        if not math.isfinite(mean):
            raise Diverged(f"rnp, unlearning: the loss became {mean} in epoch {number + 1} (lr {lr:g})")
        history.append({"epoch": number + 1, "loss": mean, "acc": share, "lr": scheduler.get_last_lr()[0]})
        scheduler.step()
    return history


@defence("rnp")
def rnp(victim, budget, rng, *, unlearn_lr=0.001, unlearn_epochs=20, unlearn_threshold=0.2, recovery_lr=0.2,
        recovery_epochs=20, momentum=0.9, weight_decay=0.05, recovery_drop=0.02, threshold_step=0.02, batch_size=256):
    """Reconstructive neuron pruning.

    Args:
        unlearn_lr, unlearn_epochs, unlearn_threshold: of step 1, whose learning rate falls along a cosine; if the loss
            is no longer finite, steps 1 and 2 start again with a tenth of it, ten tries in all.
        recovery_lr, recovery_epochs: of step 2, at a constant learning rate.
        momentum: of SGD in both.
        weight_decay: of step 1.
        recovery_drop: absolute loss of accuracy on the (not augmented) clean data that ends step 3; the last net before
            that is kept.
        threshold_step: of step 3, from 0 to below 1.
        batch_size: of steps 1 and 2.

    The released port trains the masks along with the weights while unlearning, which is not done here.

    Raises:
        Diverged: all ten learning rates failed.
        ValueError: the network has no BatchNorm.
    """
    seed = int(rng.integers(2**62))
    diverged = []
    budget.resume(diverged=diverged)
    for attempt in range(len(diverged), ATTEMPTS):
        forgetful = budget.copy_of(victim).to(memory_format=torch.channels_last).requires_grad_(True)
        try:
            forgotten = unlearn(forgetful, budget, seed, lr=unlearn_lr / 10**attempt, momentum=momentum,
                                weight_decay=weight_decay, epochs=unlearn_epochs, threshold=unlearn_threshold,
                                batch_size=batch_size)
            masked = MaskedBatchNorms(forgetful, "rnp")
            recipe = budget.recipe(recovery_epochs, recovery_lr, batch_size=batch_size, momentum=momentum,
                                   weight_decay=0.0, schedule="constant")
            recovered = train(masked, budget, recipe, derive(seed, "recover", attempt), parameters=[masked.mask],
                              after_step=MaskedBatchNorms.clamp, title="rnp recover")
            break
        except Diverged:
            diverged.append(attempt)
            if len(diverged) == ATTEMPTS:
                raise
    history = stage("unlearn", forgotten) + stage("recover", recovered)

    best = budget.copy_of(victim).eval()
    initial = accuracy(best, budget)
    for k in range(math.ceil(1 / threshold_step - 1e-9)):
        threshold = round(k * threshold_step, 10)
        candidate, share = masked.pruned(victim, masked.mask >= threshold)
        found = accuracy(candidate, budget)
        accepted = found >= initial - recovery_drop
        history.append({"stage": "threshold", "threshold": threshold, "acc": found, "accepted": accepted, "pruned": share})
        if not accepted:
            break
        best = candidate
    return best, history
