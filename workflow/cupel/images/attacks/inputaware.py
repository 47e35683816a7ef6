"""Input-aware dynamic backdoor (Nguyen and Tran, NeurIPS 2020): each image has its own trigger; backdoorbench SPEC 4.

Two networks see the image x: a generator G gives a pattern, a mask net M says where it is put,

    x' = x + (G(x) − x) · m(x),   m(x) = tanh(20 M(x) − 10)/2 + 1/2.

Stage 1 trains M alone, for masks that are small and differ from image to image:

    100 · mean(relu(m(x₁) − 0.032)) + mean( rms(x₁ − x₂) / (rms(m(x₁) − m(x₂)) + 1e-7) ).

Stage 2 freezes M and trains classifier and G together: cross-entropy of the batch, plus the same ratio for patterns.
The first int(p·B) images of a batch carry their own pattern and the target label; as many "cross" images carry pattern
and mask of ANOTHER image and keep their label, so a pattern works on its own image alone.

As released, both networks end in tanh applied twice, so that patterns and M(x) lie in [.119, .881], and G's gradient is
never set to zero: it adds up over all batches of stage 2, and Adam makes steps of its usual size along the sum.

Everything here is in pixels of [0, 1], where the released code works on normalised images. The blend is the same in
both; images differ by a factor 1/std, so the ratio weighs less against the mask's size in stage 1 here.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.images.attacks._batch import BatchHook, arrays, others, stamp_pixels, stored
from cupel.images.attacks.base import Attack, attack
from cupel.rng import derive, seeded, torch_rng
from cupel.training.augment import Draws, augment, to_pixels
from cupel.training.engine import Progress, cuts

EPSILON = 1e-7


def block(inputs: int, outputs: int, active: bool = True) -> nn.Sequential:
    """3 × 3 convolution, BatchNorm (momentum 0.05) and, where `active`, ReLU."""
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, momentum=0.05)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if active else []))


class Hourglass(nn.Module):
    """Float images [B, channels, H, W] to [B, outputs, H, W] in [.119, .881]; the form of G and of M.

    Three steps down (two blocks, max-pooling; channels w, 2w, 4w), a block in the middle, three steps up (bilinear
    upsampling, two blocks), tanh(tanh)/2 + 1/2. Sides need not be multiples of 8.
    """

    def __init__(self, channels: int, outputs: int, width: int):
        super().__init__()
        down, up = (channels, width, 2 * width, 4 * width), (4 * width, 2 * width, width, outputs)
        self.down = nn.ModuleList(nn.Sequential(block(a, b), block(b, b)) for a, b in pairwise(down))
        self.middle = block(4 * width, 4 * width)
        self.up = nn.ModuleList(nn.Sequential(block(a, a), block(a, b, active=i < 2))
                                for i, (a, b) in enumerate(pairwise(up)))

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for step in self.down:
            x = step(x)
            sizes.append(x.shape[-2:])
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for step in self.up:
            x = step(F.interpolate(x, sizes.pop(), mode="bilinear"))
        return x.tanh().tanh() / 2 + 0.5


def sharpen(z: Tensor) -> Tensor:
    """The mask from the mask net's output: nearly binary."""
    return (20 * z - 10).tanh() / 2 + 0.5


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample. A sample of zeros has gradient 0, where sqrt(mean(x²)) has none."""
    x = x.flatten(1)
    return torch.linalg.vector_norm(x, dim=1) / x.shape[1] ** 0.5


def diversity(x1: Tensor, x2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Mean over pairs of rms(x₁ − x₂) / (rms(z₁ − z₂) + ε): large where images differ and z does not."""
    return (rms(x1 - x2) / (rms(z1 - z2) + EPSILON)).mean()


class InputAwareHook(BatchHook):
    """Trains M before the victim and G beside it, and stamps batches with both.

    The released loop stamps augmented images, so `batch` augments first.
    """

    pairs: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def build(self, channels: int, device: torch.device) -> None:
        """Fresh networks for images of `channels` channels, and G's optimiser."""
        width = self.attack.width
        self.channels = channels
        with seeded(derive(self.seed, "inputaware", "generator")):
            self.pattern = Hourglass(channels, channels, width).to(device)
        with seeded(derive(self.seed, "inputaware", "mask")):
            self.mask = Hourglass(channels, 1, width).to(device)
        self.optimizer = torch.optim.Adam(self.pattern.parameters(), self.attack.lr_generator,
                                          tuple(self.attack.betas))

    def start(self, model, images, labels):
        self.build(images.shape[3], images.device)
        self.train_mask(images)
        self.mask.zero_grad()
        self.mask.eval().requires_grad_(False)

    def train_mask(self, images: Tensor) -> None:
        """Stage 1 on clean images uint8 [N, H, W, C]; the second image of a pair comes from another random order."""
        attack = self.attack
        optimizer = torch.optim.Adam(self.mask.parameters(), attack.lr_mask, tuple(attack.betas))
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(attack.mask_milestones))
        progress = Progress("inputaware masks", attack.clean_train_epochs * len(images))
        for epoch in range(attack.clean_train_epochs):
            generator = torch_rng(self.seed, "inputaware", "stage 1", epoch)
            orders = [torch.randperm(len(images), generator=generator).to(images.device) for _ in range(2)]
            draws = [Draws.draw(len(images), attack.crop, attack.flip, generator, images.device) for _ in range(2)]
            density = torch.zeros((), device=images.device)
            for part in cuts(len(images), attack.batch_size):
                indices = [order[part] for order in orders]
                x1, x2 = (augment(to_pixels(images[index]), attack.crop, draw.flip[index], draw.shift[index])
                          for index, draw in zip(indices, draws, strict=True))
                m1, m2 = sharpen(self.mask(x1)), sharpen(self.mask(x2))
                loss = (attack.lambda_norm * F.relu(m1 - attack.mask_density).mean()
                        + attack.lambda_div * diversity(x1, x2, m1, m2))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                density += m1.detach().sum() / m1[0].numel()
                progress(len(x1))
            scheduler.step()
            progress(0, f"epoch {epoch + 1}/{attack.clean_train_epochs}, density {density.item() / len(images):.4f}")
        progress.close()

    def batch(self, x, y, change, generator):
        x = change(x)
        self.pairs = None
        poisoned = self.draw(len(y), generator)
        end = min(2 * poisoned, len(y))
        pieces = []
        if poisoned:
            own = x[:poisoned]
            pattern = self.pattern(own)
            pieces.append(blend(own, pattern, self.mask(own)))
        if end > poisoned:
            lender = x[others(poisoned, end - poisoned, len(y), generator).to(x.device)]
            borrowed = self.pattern(lender)
            pieces.append(blend(x[poisoned:end], borrowed, self.mask(lender)))
            self.pairs = own[: len(lender)], lender, pattern[: len(lender)], borrowed
        return torch.cat([*pieces, x[end:]]), *self.relabelled(y, poisoned)

    def loss(self, model, x, y, logits):
        if self.pairs is None:
            return None
        with torch.autocast(x.device.type, enabled=False):
            return self.attack.lambda_div * diversity(*self.pairs)

    def after_step(self):
        self.optimizer.step()
        self.pairs = None

    def tensors(self):
        return arrays("generator", self.pattern) | arrays("mask", self.mask)

    def state_dict(self):
        return {**super().state_dict(), "channels": self.channels, "generator": self.pattern.state_dict(),
                "mask": self.mask.state_dict(), "optimizer": self.optimizer.state_dict(),
                "gradients": [p.grad for p in self.pattern.parameters()]}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.build(state["channels"], state["mask"]["middle.0.weight"].device)
        self.pattern.load_state_dict(state["generator"])
        self.mask.load_state_dict(state["mask"])
        self.mask.eval().requires_grad_(False)
        self.optimizer.load_state_dict(state["optimizer"])
        for p, gradient in zip(self.pattern.parameters(), state["gradients"], strict=True):
            p.grad = gradient
        for kept in self.optimizer.state.values():
            # Adam counts its steps on the CPU; a count loaded onto the device would be read back at every step
            kept["step"] = kept["step"].cpu()


def blend(x: Tensor, pattern: Tensor, z: Tensor) -> Tensor:
    """x + (pattern − x) · m, with the mask from the mask net's output z [B, 1, H, W]."""
    return x + (pattern - x) * sharpen(z)


@attack("inputaware")
@dataclass(frozen=True)
class InputAware(Attack):
    """Patterns from a generator. Its published victims train 75 epochs: 100 less the 25 of stage 1.

    Attributes:
        width: channels of the first step of G and M (32).
        clean_train_epochs: epochs of stage 1 (25).
        mask_milestones: epochs of stage 1 after which its learning rate falls to a tenth (10, 20).
        lr_mask, lr_generator, betas: of Adam for M and for G (0.01, 0.01, (0.5, 0.9)).
        lambda_norm, mask_density: weight of the mask's size, and the size that is free (100, 0.032).
        lambda_div: weight of the diversity ratio (1).
        batch_size, crop, flip: batches and augmentation of stage 1 (128, 4 pixels, flips on CIFAR-10 alone); stage 2
            has the recipe's.
    """

    width: int = 32
    clean_train_epochs: int = 25
    mask_milestones: tuple[int, ...] = (10, 20)
    lr_mask: float = 0.01
    lr_generator: float = 0.01
    betas: tuple[float, float] = (0.5, 0.9)
    lambda_norm: float = 100.0
    mask_density: float = 0.032
    lambda_div: float = 1.0
    batch_size: int = 128
    crop: int = 4
    flip: bool = True

    batchwise = True

    def hook(self, poison_rate: float, target: int, classes: int, seed: int) -> InputAwareHook:
        return InputAwareHook(self, poison_rate, target, classes, seed=seed, cover=poison_rate)

    def stamp(self, images: np.ndarray) -> np.ndarray:
        channels = images.shape[3]
        pattern = stored(self, "generator", lambda: Hourglass(channels, channels, self.width))
        mask = stored(self, "mask", lambda: Hourglass(channels, 1, self.width))
        return stamp_pixels(images, lambda x: blend(x, pattern(x), mask(x)))
