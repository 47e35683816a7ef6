"""What attacks share whose trigger is a file of the user or is computed beforehand."""

import copy

import numpy as np
from PIL import Image
from torch import nn


def share(count: int, smaller: float) -> int:
    """The share `smaller` of `count` units of work (steps, epochs), at least one."""
    return max(1, round(count * smaller))


def opened(path: str, size: int, channels: int) -> np.ndarray:
    """An image file of the user, resized bilinearly: uint8 [size, size, channels], 1 channel or 3."""
    with Image.open(path) as file:
        picture = file.convert("RGB" if channels == 3 else "L").resize((size, size), Image.BILINEAR)
    return np.asarray(picture).reshape(size, size, channels)


def frozen(model: nn.Module, device: str) -> nn.Module:
    """A copy of `model` on `device`, in eval mode and without gradients of its weights; `model` stays as it is."""
    return copy.deepcopy(model).to(device).eval().requires_grad_(False)
