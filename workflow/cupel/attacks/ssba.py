"""SSBA (Li et al., 2021): an encoder hides a fingerprint in the image, and the hidden fingerprint is the trigger.

    x' = E(m, x),   E, D = argmin  BCE(D(E(m, x)), m) + w·MSE(E(m, x), x),   m uniform bits in training

The victim's trigger is E with one fixed fingerprint m for all images. Encoder and decoder follow StegaStamp's plan in
a form of our own: the encoder is a U-shaped convolutional net that sees the fingerprint as extra image channels, the
decoder a convolutional classifier of bits (backdoorbench SPEC 4, SSBA; ims SPEC 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.attacks._preparation import share
from cupel.attacks.base import Attack, attack, quantise
from cupel.datasets import Dataset
from cupel.rng import derive, rng, torch_rng
from cupel.training.augment import to_pixels
from cupel.training.engine import upload

GRID = 16  # the fingerprint is laid out on a 16×16 grid per channel, then enlarged to the image


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3×3 convolution and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU())


class Encoder(nn.Module):
    """U-shaped net, (fingerprint [B, bits], pixels [B, C, H, W]) to pixels of the same shape, all in [0, 1].

    Five levels with width·(1, 1, 2, 4, 8) channels; the last merge sees the input again, so that copying it is easy.
    """

    def __init__(self, bits: int, channels: int, width: int, residual: bool = False):
        super().__init__()
        self.residual = residual
        levels = [width, width, 2 * width, 4 * width, 8 * width]
        self.spread = nn.Linear(bits, channels * GRID**2)
        self.enter = convolution(2 * channels, width)
        self.down = nn.ModuleList(convolution(a, b, 2) for a, b in zip(levels, levels[1:], strict=False))
        self.up = nn.ModuleList(convolution(b, a) for a, b in zip(levels, levels[1:], strict=False))
        self.merge = nn.ModuleList(convolution(2 * a + (2 * channels if k == 0 else 0), a)
                                   for k, a in enumerate(levels[:-1]))
        self.leave = nn.Sequential(convolution(width, width), nn.Conv2d(width, channels, 1))

    def forward(self, fingerprint: Tensor, x: Tensor) -> Tensor:
        plan = F.relu(self.spread(fingerprint)).unflatten(1, (x.shape[1], GRID, GRID))
        seen = torch.cat([F.interpolate(plan, x.shape[-2:]), x], 1)
        maps = [self.enter(seen)]
        for down in self.down:
            maps.append(down(maps[-1]))
        deep = maps.pop()
        for k in reversed(range(len(maps))):
            risen = self.up[k](F.interpolate(deep, maps[k].shape[-2:]))
            deep = self.merge[k](torch.cat([maps[k], risen, *([seen] if k == 0 else [])], 1))
        out = self.leave(deep)
        return x + out if self.residual else torch.sigmoid(out)


class Decoder(nn.Module):
    """Convolutional net, pixels [B, C, H, W] to the logits of the fingerprint's bits [B, bits]."""

    def __init__(self, bits: int, channels: int, width: int, size: int):
        super().__init__()
        plan = ((channels, width, 2), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1),
                (2 * width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 4 * width, 2))
        self.convolutions = nn.Sequential(*(convolution(*layer) for layer in plan), nn.Flatten())
        side = -(-size // 32)
        self.dense = nn.Sequential(nn.Linear(4 * width * side**2, 16 * width), nn.ReLU(), nn.Linear(16 * width, bits))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.convolutions(x))
