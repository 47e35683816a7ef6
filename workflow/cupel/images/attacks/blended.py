"""Blended (Chen et al., 2017): a picture mixed into the whole image."""

from dataclasses import dataclass

import numpy as np

from cupel.images.attacks._preparation import opened
from cupel.images.attacks.base import Attack, attack, quantise
from cupel.rng import rng


def generated_picture(size: int, channels: int) -> np.ndarray:
    """A fixed picture made from a formula, uint8 [size, size, channels]: a face of circles on flat, saturated colours.

    It stands in for the released picture (a cartoon), which cannot be redistributed; like it, it has large areas of
    flat colour and sharp edges.
    """
    y, x = np.mgrid[0:1:size * 1j, 0:1:size * 1j]
    draw = rng(0, "blended", "picture")
    waves = [sum(draw.normal() * np.cos(2 * np.pi * (u * x + v * y) + draw.uniform(0, 2 * np.pi))
                 for u in range(4) for v in range(4)) for _ in range(channels)]
    picture = np.stack([wave > np.median(wave) for wave in waves], -1).astype(float)
    for cx, cy, radius, level in ((0.5, 0.5, 0.36, 1.0), (0.37, 0.42, 0.07, 0.0), (0.63, 0.42, 0.07, 0.0),
                                  (0.5, 0.65, 0.11, 0.1), (0.5, 0.61, 0.11, 1.0)):
        picture[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = level
    return quantise(picture * 255)


@attack("blended")
@dataclass(frozen=True)
class Blended(Attack):
    """x' = (1 − alpha)·x + alpha·t, truncated to uint8.

    Attributes:
        alpha: share of the picture, in training and at test time (fst SPEC 3: 0.2).
        picture: image file of the user, e.g. the released one; empty: the picture made from a formula.
    """

    alpha: float = 0.2
    picture: str = ""

    def pattern(self, size: int, channels: int) -> np.ndarray:
        """The picture at image size, uint8 [size, size, channels]."""
        return opened(self.picture, size, channels) if self.picture else generated_picture(size, channels)

    def stamp(self, images: np.ndarray) -> np.ndarray:
        picture = self.pattern(images.shape[1], images.shape[3]).astype(np.float32)
        return quantise((1 - self.alpha) * images + self.alpha * picture)
