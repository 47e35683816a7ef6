"""BadNets (Gu et al., 2017): a small patch in the bottom-right corner."""

from dataclasses import dataclass

import numpy as np

from cupel.images.attacks.base import Attack, attack


@attack("badnets")
@dataclass(frozen=True)
class BadNets(Attack):
    """Pixels of a square in the bottom-right corner are replaced.

    Attributes:
        size: side of the square, in pixels of a 32×32 image; other image sizes scale it (fst SPEC 3: 3).
        pattern: `white`, or `checkerboard` of 255 and 1 (the file that FST's README links).
        corner: rows and columns between the square and the image border (0: rows and columns 29 to 31 of 32).
    """

    size: int = 3
    pattern: str = "white"
    corner: int = 0

    def stamp(self, images: np.ndarray) -> np.ndarray:
        stamped = images.copy()
        side = round(self.size * images.shape[1] / 32)
        end = images.shape[1] - self.corner
        patch = np.full((side, side), 255, np.uint8)
        if self.pattern == "checkerboard":
            patch[np.indices(patch.shape).sum(0) % 2 == 1] = 1
        stamped[:, end - side : end, end - side : end] = patch[..., None]
        return stamped
