"""BppAttack (Wang, Zhai and Ma, CVPR 2022): colours reduced to a few levels; backdoorbench SPEC 4.

    x' = round(x · (L − 1)) / (L − 1),   L = 8 levels, x in [0, 1],

optionally with Floyd-Steinberg dithering. In each batch int(p·B) images are reduced and relabelled. As many as
int(0.1·B) others, the negatives, get the change x'_r − x_r of another image r and keep their label, so that the change
alone does not mean the target.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.images.attacks._batch import Augmenting, AugmentingHook, others, stamp_pixels
from cupel.images.attacks.base import attack


def squeeze(images: Tensor, levels: int) -> Tensor:
    """Round float pixels in [0, 1] to the nearest of `levels` equidistant values."""
    return (images * (levels - 1)).round().clamp(0, levels - 1) / (levels - 1)


def dither(images: Tensor, levels: int) -> Tensor:
    """Floyd-Steinberg error diffusion of float [B, C, H, W] in [0, 1].

    In raster order each pixel is rounded, and its error goes to the pixels not yet done: 7/16 right, 3/16 below left,
    5/16 below, 1/16 below right. A pixel (r, c) depends on those with smaller c + 2r only, so all pixels of
    equal c + 2r are done at once, in the same order of sums.
    """
    height, width = images.shape[-2:]
    # a border takes the errors that leave the image: a column left and right, a row below
    canvas = F.pad(images, (1, 1, 0, 1))
    for wave in range(width + 2 * (height - 1)):
        rows = torch.arange(max(0, -(-(wave - width + 1) // 2)), min(height - 1, wave // 2) + 1, device=images.device)
        columns = wave - 2 * rows + 1
        old = canvas[..., rows, columns]
        new = squeeze(old, levels)
        canvas[..., rows, columns] = new
        error = old - new
        for down, right, share in ((1, 1, 1 / 16), (1, 0, 5 / 16), (1, -1, 3 / 16), (0, 1, 7 / 16)):
            canvas[..., rows + down, columns + right] += error * share
    return canvas[..., :height, 1 : width + 1]


class BPPHook(AugmentingHook):
    """Reduces the colours of batches."""

    def batch(self, x, y, change, generator):
        poisoned = self.draw(len(y), generator)
        if poisoned:
            end = min(poisoned + int(self.attack.neg_ratio * len(y)), len(y))
            lender = x[others(poisoned, end - poisoned, len(y), generator).to(x.device)]
            reduced = self.attack.trigger(torch.cat([x[:poisoned], lender]))
            negative = (x[poisoned:end] + (reduced[poisoned:] - lender)).clamp(0, 1)
            x = torch.cat([reduced[:poisoned], negative, x[end:]])
        return self.augmented(x, change, generator), *self.relabelled(y, poisoned)


@attack("bpp")
@dataclass(frozen=True)
class BPP(Augmenting):
    """Colour quantisation.

    Attributes:
        squeeze_num: levels of each channel (8).
        dithering: diffuse the rounding error (False).
        neg_ratio: share of negatives in a batch that has poisoned images, whatever the poison rate (0.1).
        random_crop, random_rotation, flip, own_augmentation: see `Augmenting`.
    """

    squeeze_num: int = 8
    dithering: bool = False
    neg_ratio: float = 0.1

    def trigger(self, x: Tensor) -> Tensor:
        """The trigger on float pixels [B, C, H, W] in [0, 1]."""
        return (dither if self.dithering else squeeze)(x, self.squeeze_num)

    def hook(self, poison_rate: float, target: int, classes: int, seed: int) -> BPPHook:
        return BPPHook(self, poison_rate, target, classes, seed=seed, cover=self.neg_ratio)

    def stamp(self, images: np.ndarray) -> np.ndarray:
        return stamp_pixels(images, self.trigger)
