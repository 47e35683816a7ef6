"""Progressive Backdoor Erasing, its adversarial fine-tuning (Mu et al., CVPR 2023), as in the IMS fork; ims SPEC 7.

Each round is one pass of adversarial training and one of normal training. The attack is projected gradient ascent on
the cross-entropy from a random start in the L∞ ball, against the network in train mode, as released.
"""

import torch
import torch.nn.functional as F

from cupel.images.defences.base import defence
from cupel.images.defences.passes import stage, train
from cupel.training.adversarial import in_linf, perturb
from cupel.training.hook import Hook


class AdversarialTraining(Hook):
    """Replaces every batch by adversarial images.

    Args:
        model: the network that is trained.
        eps, steps, step_size: of the attack.
        clamp: `pixel`: eps counts pixels in [0, 1] and images stay there. `normalised`: as released, eps counts
            normalised values and the normalised image is cut to [0, 1], which erases all that is darker than the mean.
    """

    def __init__(self, model, eps: float, steps: int, step_size: float, clamp: str):
        self.model, self.eps, self.steps, self.step_size = model, eps, steps, step_size
        self.normalised = clamp == "normalised"

    def attack(self, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Adversarial images, pixels float [B, C, H, W] as `x`; under `normalised` they may lie outside [0, 1]."""
        std, mean = self.model.normalize.std, self.model.normalize.mean
        base = (x - mean) / std if self.normalised else x

        def pixels(values):
            return values * std + mean if self.normalised else values

        def loss(delta):
            return -F.cross_entropy(self.model(pixels(base + delta)), y)

        def project(delta):
            return (base + in_linf(delta, self.eps)).clamp(0, 1) - base

        start = (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device) * self.eps
        return pixels(base + perturb(start, loss, project, steps=self.steps, step_size=self.step_size))

    def batch(self, x, y, change, generator):
        return self.attack(change(x), y, generator), y, None


@defence("pbe")
def pbe(victim, budget, rng, *, eps=0.02, step_size=0.004, steps=7, rounds=20, lr=0.01, batch_size=256, momentum=0.9,
        weight_decay=5e-4, clamp="pixel"):
    """Alternate adversarial and normal training.

    Args:
        eps, step_size, steps: of the attack; released: steps of eps/5.
        rounds: pairs of passes.
        lr, batch_size, weight_decay: of both passes, constant.
        momentum: of the normal passes, and started anew in each; the released code makes a new optimiser for every
            batch of an adversarial pass, which amounts to none there.
        clamp: `pixel` or `normalised` (as released), see `AdversarialTraining`.
    """
    model = budget.copy_of(victim)
    adversarial = AdversarialTraining(model, eps, steps, step_size, clamp)
    budget.resume(model=model)
    history = []
    for _ in range(rounds):
        for name, hook, inertia in (("adversarial", adversarial, 0.0), ("normal", None, momentum)):
            recipe = budget.recipe(1, lr, batch_size=batch_size, momentum=inertia, weight_decay=weight_decay,
                                   schedule="constant")
            history += stage(name, train(model, budget, recipe, rng, hook=hook, title=f"pbe {name}"))
    return model, history
