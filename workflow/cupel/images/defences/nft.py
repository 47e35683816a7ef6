"""Neural Mask Fine-Tuning (Karim et al., ECCV 2024), as in the IMS authors' BackdoorBench fork; ims SPEC 7.

Only one mask entry M per BatchNorm channel is tuned, on MixUp samples, and held between a floor that falls with depth
(l = 1 is the first BatchNorm layer) and 1:

    min over M    E CE_mixup(f_M(λx + (1 − λ)x'), y, y') + η·Σ|1 − M| / SPC     a·exp(−b·l) ≤ M_l ≤ 1,  λ ~ Beta(1, 1)

SPC is the number of samples per class. Train mode throughout: the running statistics of the returned network have
moved. The mask, soft, is multiplied into γ.
"""

import math

import torch
import torch.nn.functional as F

from cupel.images.defences.base import defence
from cupel.images.defences.masks import Channels, MaskedBatchNorms
from cupel.images.defences.passes import train
from cupel.training.hook import Hook


def floors(channels: Channels, alpha: float, beta: float) -> torch.Tensor:
    """Lower bound of each mask entry, float32 [N]: alpha·exp(−beta·l), l counted from 1."""
    return torch.cat([torch.full((size,), alpha * math.exp(-beta * number))
                      for number, size in enumerate(channels.sizes, 1)])


class MixUp(Hook):
    """Mixes each batch with a permutation of itself; one λ ~ Beta(1, 1), the uniform distribution, a batch."""

    def batch(self, x, y, change, generator):
        x = change(x)
        self.share = float(torch.rand((), generator=generator))
        partner = torch.randperm(len(y), generator=generator).to(y.device)
        self.partner = y[partner]
        return self.share * x + (1 - self.share) * x[partner], y, None

    def cross_entropy(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """λ·CE(y) + (1 − λ)·CE(y') of the batch made last."""
        return self.share * F.cross_entropy(logits, y) + (1 - self.share) * F.cross_entropy(logits, self.partner)


@defence("nft")
def nft(victim, budget, rng, *, lr=0.1, lr_min=0.02, momentum=0.95, epochs=100, batch_size=256, l1_weight=0.001,
        alpha=0.8, beta=0.5):
    """Neural mask fine-tuning.

    Args:
        lr, lr_min: SGD follows a cosine from one to the other.
        momentum, epochs, batch_size: of SGD, without weight decay.
        l1_weight: η.
        alpha, beta: a and b of the floor.

    The accuracy in the history is that of mixed samples against y alone.

    Raises:
        ValueError: the network has no BatchNorm.
    """
    masked = MaskedBatchNorms(budget.copy_of(victim), "nft")
    low = floors(masked.channels, alpha, beta).to(masked.mask)
    mixup, weight = MixUp(), l1_weight / (len(budget) / budget.classes)

    def objective(network, x, y):
        logits = network(x)
        return mixup.cross_entropy(logits, y) + weight * (1 - masked.mask).abs().sum(), logits

    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=0.0, lr_min=lr_min)
    history = train(masked, budget, recipe, rng, objective=objective, hook=mixup, parameters=[masked.mask],
                    after_step=lambda network: network.clamp(low), title="nft")
    return masked.finish(), history
