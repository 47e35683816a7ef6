"""Batched augmentation on the device: what torchvision does per image, for a whole batch at once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, C] to float32 pixels [B, C, H, W] in [0, 1], in channels-last memory."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255)


@dataclass(frozen=True)
class Draws:
    """Random numbers of one epoch, one entry per sample, drawn on the CPU and moved to the device at once.

    Attributes:
        flip: bool [N].
        shift: int64 [N, 2], row and column of the crop in the padded image.
    """

    flip: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def draw(cls, count: int, crop: int, flip: bool, generator: torch.Generator, device: torch.device) -> "Draws":
        coins = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool)
        shift = torch.randint(0, 2 * crop + 1, (count, 2), generator=generator)
        return cls(coins.to(device), shift.to(device))


def augment(images: torch.Tensor, crop: int, flip: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Random crop after zero padding, then horizontal flip, per sample.

    Args:
        images: float [B, C, H, W].
        crop: zero padding on each side, in pixels; 0 for none.
        flip: bool [B].
        shift: int64 [B, 2] in [0, 2·crop].
    """
    if crop:
        batch, channels, height, width = images.shape
        padded = F.pad(images, (crop,) * 4)
        rows = (shift[:, :1] + torch.arange(height, device=images.device))[:, None, :, None]
        columns = (shift[:, 1:] + torch.arange(width, device=images.device))[:, None, None, :]
        index = torch.arange(batch, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        images = padded[index, channel, rows, columns].contiguous(memory_format=torch.channels_last)
    return torch.where(flip[:, None, None, None], images.flip(3), images)
