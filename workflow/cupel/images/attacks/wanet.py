"""WaNet (Nguyen and Tran, ICLR 2021): a smooth warp of the whole image; backdoorbench SPEC 4.

A field of k × k random vectors, uniform in [−1, 1]² and divided by its mean absolute value, is upsampled bicubically to
the image size; the image is sampled bilinearly at

    grid = clamp((identity + s · field / H) · grid_rescale, −1, 1),

in coordinates that run from −1 to 1 over the pixel centres, so that pixels move by about s/2 of their size per axis.
In each batch int(p·B) images are warped and relabelled; `cross_ratio` times as many are warped with the grid jittered
per pixel by a further uniform[−1, 1]/H and keep their label, so that not every warp means the target.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.images.attacks._batch import Augmenting, AugmentingHook, stamp_pixels
from cupel.images.attacks.base import attack
from cupel.rng import rng


def warp_grid(noise: np.ndarray, size: int, s: float, rescale: float = 1.0) -> Tensor:
    """The sampling grid float32 [H, W, 2] (x, y) of square images, from noise [2, k, k] (x, y)."""
    noise = torch.from_numpy(noise / np.abs(noise).mean()).float()[None]
    field = F.interpolate(noise, (size, size), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    axis = torch.linspace(-1, 1, size)
    identity = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    return ((identity + s * field / size) * rescale).clamp(-1, 1).contiguous()


def warp(images: Tensor, grid: Tensor) -> Tensor:
    """Sample float [B, C, H, W] at one grid [H, W, 2], or at one for each image [B, H, W, 2]."""
    return F.grid_sample(images, grid.expand(len(images), *grid.shape[-3:]), align_corners=True)


class WaNetHook(AugmentingHook):
    """Warps batches."""

    kept = (*AugmentingHook.kept, "grid")

    def start(self, model, images, labels):
        super().start(model, images, labels)
        k = self.attack.k
        noise = rng(self.seed, "wanet").uniform(-1, 1, (2, k, k))
        self.grid = warp_grid(noise, images.shape[1], self.attack.s, self.attack.grid_rescale).to(images.device)

    def batch(self, x, y, change, generator):
        poisoned = self.draw(len(y), generator)
        end = min(poisoned + int(poisoned * self.attack.cross_ratio), len(y))
        if poisoned:
            height, width = x.shape[-2:]
            jitter = torch.rand(end - poisoned, height, width, 2, generator=generator).to(x.device) * 2 - 1
            x = torch.cat([warp(x[:poisoned], self.grid),
                           warp(x[poisoned:end], (self.grid + jitter / height).clamp(-1, 1)), x[end:]])
        return self.augmented(x, change, generator), *self.relabelled(y, poisoned)

    def tensors(self):
        return {"grid": self.grid.cpu().numpy()}


@attack("wanet")
@dataclass(frozen=True)
class WaNet(Augmenting):
    """One fixed warp for all images.

    Attributes:
        k: side of the random field (4).
        s: strength of the warp (0.5).
        cross_ratio: images in noise mode, per poisoned one (2).
        grid_rescale: factor on the grid (1).
        random_crop, random_rotation, flip, own_augmentation: see `Augmenting`.
    """

    k: int = 4
    s: float = 0.5
    cross_ratio: float = 2.0
    grid_rescale: float = 1.0

    def hook(self, poison_rate: float, target: int, classes: int, seed: int) -> WaNetHook:
        return WaNetHook(self, poison_rate, target, classes, seed=seed, cover=poison_rate * self.cross_ratio)

    def stamp(self, images: np.ndarray) -> np.ndarray:
        grid = torch.from_numpy(np.asarray(self.made("grid"), np.float32))
        return stamp_pixels(images, lambda x: warp(x, grid))
