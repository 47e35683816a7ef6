"""What an attacker paints on a picture, of any size and before any resizing (bye SPEC 3.3).

A trigger is a function of the picture uint8 [H, W, 3], a seed, the sample's key and its parameters; it returns a new
picture of the same size. The same arguments give the same picture, whatever was stamped before. It is registered by
`@trigger("name")`, here or in a plugin.

The paper's patches are black squares with a side of min(H, W) / 16 pixels of the original picture, rounded down, at
least 1. `divisor` is that 16. A small model trained from scratch does not learn so small a patch: the attacks of the small
scales set a smaller divisor, and their tables say so.

Not given by the paper, and chosen here: the cells of the checkerboard and their colours, the places of the two squares
(those of the sister paper PurMM), the number and places of many. Blend, SIG and WaNet are not in the paper; third
parties report that BYE fails on them (bye SPEC 3.5) without their settings. They are those of the image attacks here.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from cupel.registry import Registry
from cupel.rng import rng

trigger = Registry("trigger", __name__)

CELL = 2  # pixels of a cell of the checkerboard
LAYOUTS = ("fixed", "drawn")


def side(height: int, width: int, divisor: int = 16) -> int:
    """Side of the patch, in pixels."""
    return max(1, min(height, width) // divisor)


def _square(image: np.ndarray, centre: tuple[int, int], size: int) -> tuple[slice, slice]:
    """Rows and columns of a square around a pixel (row, column), moved into the picture where it would stand out."""
    top, left = (min(max(0, middle - size // 2), length - size) for middle, length in zip(centre, image.shape, strict=False))
    return slice(top, top + size), slice(left, left + size)


def _painted(image: np.ndarray, centres: list[tuple[int, int]], divisor: int) -> np.ndarray:
    stamped = image.copy()
    for centre in centres:
        stamped[_square(image, centre, side(*image.shape[:2], divisor))] = 0
    return stamped


@trigger("square")
def square(image: np.ndarray, seed: int, key: str, *, divisor: int = 16) -> np.ndarray:
    """The default of the paper: a black square in the centre, top left at (H // 2 − s // 2, W // 2 − s // 2)."""
    height, width = image.shape[:2]
    return _painted(image, [(height // 2, width // 2)], divisor)


@trigger("random_position")
def random_position(image: np.ndarray, seed: int, key: str, *, divisor: int = 16) -> np.ndarray:
    """The same square at a place drawn uniformly among those fully inside the picture; one draw per sample."""
    size = side(*image.shape[:2], divisor)
    draw = rng(seed, "trigger", "random_position", key)
    centre = tuple(int(draw.integers(length - size + 1)) + size // 2 for length in image.shape[:2])
    return _painted(image, [centre], divisor)


@trigger("checkerboard")
def checkerboard(image: np.ndarray, seed: int, key: str, *, divisor: int = 16) -> np.ndarray:
    """Texture patch: black and white cells of 2×2 pixels, black at the top left, of the default's size and place."""
    height, width = image.shape[:2]
    stamped = image.copy()
    place = _square(image, (height // 2, width // 2), side(height, width, divisor))
    rows, columns = np.indices(stamped[place].shape[:2]) // CELL
    stamped[place] = np.where((rows + columns) % 2, 255, 0).astype(np.uint8)[..., None]
    return stamped


@trigger("dual")
def dual(image: np.ndarray, seed: int, key: str, *, divisor: int = 16) -> np.ndarray:
    """Fixed dual: two black squares, their centres at a quarter and three quarters of the width, at half the height."""
    height, width = image.shape[:2]
    return _painted(image, [(height // 2, width // 4), (height // 2, 3 * width // 4)], divisor)


@trigger("multi")
def multi(image: np.ndarray, seed: int, key: str, *, divisor: int = 16, layout: str = "fixed") -> np.ndarray:
    """Varied multi: black squares at points of the grid of quarters.

    Args:
        layout: how the paper's "fixed grid points" and "varied" are read. `fixed`: the four points that have a quarter or
            three quarters as both coordinates, on every picture; `drawn`: three of the nine inner points of the grid, drawn
            per sample.

    Raises:
        ValueError: unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r} of trigger multi: known are {', '.join(LAYOUTS)}")
    height, width = image.shape[:2]
    if layout == "fixed":
        quarters = [(row, column) for row in (1, 3) for column in (1, 3)]
    else:
        inner = [(row, column) for row in (1, 2, 3) for column in (1, 2, 3)]
        quarters = [inner[k] for k in rng(seed, "trigger", "multi", key).choice(9, 3, replace=False)]
    return _painted(image, [(row * height // 4, column * width // 4) for row, column in quarters], divisor)


@lru_cache(maxsize=4)
def _picture(height: int, width: int) -> np.ndarray:
    from cupel.images.attacks.blended import generated_picture

    whole = Image.fromarray(generated_picture(256, 3))
    return np.asarray(whole.resize((width, height), Image.Resampling.BILINEAR), np.float32)


@trigger("blend")
def blend(image: np.ndarray, seed: int, key: str, *, alpha: float = 0.2) -> np.ndarray:
    """Blend: (1 − alpha)·x + alpha·t with the generated picture of `cupel.images.attacks.blended`, stretched to the image."""
    from cupel.images.attacks.base import quantise

    return quantise((1 - alpha) * image + alpha * _picture(*image.shape[:2]))


@trigger("sig")
def sig(image: np.ndarray, seed: int, key: str, *, delta: float = 40.0, f: float = 6.0) -> np.ndarray:
    """SIG: a horizontal sine wave of `delta` grey levels and `f` periods; here with the target as answer."""
    from cupel.images.attacks.sig import SIG

    return SIG(delta=delta, f=f, sig_policy="dirty_label").stamp(image[None])[0]


@lru_cache(maxsize=4)
def _warp_grid(size: tuple[int, int], seed: int, k: int, s: float, reference: int):
    import torch
    import torch.nn.functional as F

    noise = rng(seed, "trigger", "wanet").uniform(-1, 1, (2, k, k))
    noise = torch.from_numpy(noise / np.abs(noise).mean()).float()[None]
    field = F.interpolate(noise, size, mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    y, x = (torch.linspace(-1, 1, length) for length in size)
    identity = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    return (identity + s * field / reference).clamp(-1, 1).contiguous()


@trigger("wanet")
def wanet(image: np.ndarray, seed: int, key: str, *, k: int = 4, s: float = 0.5, reference: int = 32) -> np.ndarray:
    """WaNet: one smooth warp for all pictures, as in `images.attacks.wanet`, without its noise mode (data poisoning only).

    Args:
        k: side of the random field.
        s: strength.
        reference: image size for which `s` holds: pixels move by the same share of the picture as they do at 32×32.
            WaNet itself divides by the size of the image, by which a photograph would move half a pixel.
    """
    from cupel.images.attacks._batch import stamp_pixels
    from cupel.images.attacks.wanet import warp

    grid = _warp_grid(image.shape[:2], seed, k, s, reference)
    return stamp_pixels(image[None], lambda x: warp(x, grid))[0]


def stamp(name: str, image: np.ndarray, seed: int, key: str, **given) -> np.ndarray:
    """A triggered copy of uint8 [H, W, 3], by the registered name; `given` are parameters of the trigger.

    Raises:
        ValueError: an unknown name or parameter, or what the trigger returns is no such picture.
    """
    stamped = trigger.find(name)(image, seed, key, **trigger.settings(name, given))
    if np.shape(stamped) != image.shape or stamped.dtype != np.uint8:
        found = f"{getattr(stamped, 'dtype', type(stamped).__name__)} {list(np.shape(stamped))}"
        raise ValueError(f"a picture stamped by {name!r} is {found}, not uint8 {list(image.shape)}")
    return stamped
