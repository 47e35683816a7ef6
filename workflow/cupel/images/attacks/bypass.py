"""Bypass: FST's adaptive attack, after the adversarial embedding of Tan and Shokri (arXiv 1905.13409); fst SPEC 3.

Samples are poisoned in advance, as by BadNets or Blended. In training a discriminator D learns to tell poisoned from
clean samples by their features φ(x), and the victim learns to prevent it:

    victim:  CE(h(x), y) − λ · BCE(D(φ(x)), z)        D:  BCE(D(φ(x)), z) with φ(x) detached

with z = 1 for poisoned samples. D: d → 256 → 128 → 1, BatchNorm and LeakyReLU(0.2) between; one SGD step of D for each
step of the victim, on the same features.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.images.attacks.badnets import BadNets
from cupel.images.attacks.base import AttackHook, attack
from cupel.images.attacks.blended import Blended
from cupel.rng import derive, seeded


def discriminator(inputs: int) -> nn.Sequential:
    """Features [B, inputs] to logits [B, 1]; the sigmoid is in the loss."""
    return nn.Sequential(nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.LeakyReLU(0.2),
                         nn.Linear(256, 128), nn.BatchNorm1d(128), nn.LeakyReLU(0.2), nn.Linear(128, 1))


@contextlib.contextmanager
def statistics_kept(model: nn.Module):
    """BatchNorm in train mode does not update its running statistics in here."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class BypassHook(AttackHook):
    """The discriminator and the victim's second term.

    The engine says in `groups` (int64 [B], 1 for poisoned samples) which samples the next batch holds.

    Features are taken from the victim's own forward pass by a forward hook on its extractor, which exists from `batch`
    to `loss`, so no finished model carries one. In the first batch of an epoch the network is not known yet, and its
    features are computed again; a run continued from a checkpoint does the very same. `torch.compile`
    leaves forward hooks out that come after its first trace: with it features are computed again in each batch, at the
    cost of a forward pass.
    """

    def __init__(self, regularisation: float, lr: float, momentum: float, seed: int):
        self.regularisation, self.lr, self.momentum, self.seed = regularisation, lr, momentum, seed
        self.discriminator = self.optimizer = None
        self.model = self.handle = self.captured = self.features = None

    def build(self, inputs: int, device: torch.device) -> None:
        """A fresh discriminator of features [B, inputs]."""
        with seeded(derive(self.seed, "bypass")):
            self.discriminator = discriminator(inputs).to(device)
        self.optimizer = torch.optim.SGD(self.discriminator.parameters(), self.lr, self.momentum)

    def epoch(self, number):
        self.model = None

    def batch(self, x, y, change, generator):
        if self.groups is None:
            raise ValueError("Bypass must know which samples are poisoned: set `groups` before each batch")
        if len(y) < 2:
            raise ValueError("Bypass normalises over the batch and cannot use one of a single sample: set drop_last")
        self.count(len(y), (self.groups == 1).sum())
        if self.model is not None:
            self.handle = self.model.extractor.register_forward_hook(self.capture)
        return change(x), y, None

    def capture(self, module, inputs, output):
        """The forward hook."""
        self.captured = output

    def loss(self, model, x, y, logits):
        features, self.captured, self.model = self.captured, None, model
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        if features is None:
            with statistics_kept(model):
                features = model.features(x)
        with torch.autocast(x.device.type, enabled=False):
            features = features.float()
            self.features = features.detach()
            if self.discriminator is None:
                self.build(features.shape[1], features.device)
            self.discriminator.requires_grad_(False)
            return -self.regularisation * self.separation(features)

    def separation(self, features: Tensor) -> Tensor:
        """BCE of the discriminator on float32 features [B, d] of the current batch."""
        return F.binary_cross_entropy_with_logits(self.discriminator(features)[:, 0], (self.groups == 1).float())

    def after_step(self):
        self.discriminator.requires_grad_(True)
        self.optimizer.zero_grad(set_to_none=True)
        self.separation(self.features).backward()
        self.optimizer.step()

    def state_dict(self):
        return {**super().state_dict(), "discriminator": self.discriminator.state_dict(),
                "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        weight = state["discriminator"]["0.weight"]
        self.build(weight.shape[1], weight.device)
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class Bypass:
    """The part of both attacks that is added to their trigger. Samples are poisoned in advance, so the attacks are not
    `batchwise` and their record holds the poisoned samples.

    Attributes:
        regularisation: λ (20).
        discriminator_lr, discriminator_momentum: of the discriminator's SGD (0.001, 0.9).
    """

    regularisation: float = 20.0
    discriminator_lr: float = 0.001
    discriminator_momentum: float = 0.9

    def hook(self, poison_rate: float, target: int, classes: int, seed: int) -> BypassHook:
        return BypassHook(self.regularisation, self.discriminator_lr, self.discriminator_momentum, seed)


@attack("badnets_bypass")
@dataclass(frozen=True)
class BadNetsBypass(Bypass, BadNets):
    """Bypass with the trigger of BadNets, whose parameters it shares."""


@attack("blended_bypass")
@dataclass(frozen=True)
class BlendedBypass(Bypass, Blended):
    """Bypass with the trigger of Blended, whose parameters it shares."""
