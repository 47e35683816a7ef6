"""What may be hung into training from outside, without the engine knowing its purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # attacks that only stamp must not pay for importing torch
    import torch
    from torch import nn


class Hook:
    """What an attack (or any method) may do during training; the engine knows nothing of its purpose.

    `batch` gets float pixels before augmentation and must return augmented ones, because some methods come before
    and some after it; `change` is the engine's augmentation for this batch.

    Attributes:
        groups: int64 [B], groups of the current batch (see `fit`), set before `batch` is called.
    """

    groups: torch.Tensor | None = None

    def start(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Called once before the first epoch of a fresh run (not of a continued one)."""

    def epoch(self, number: int) -> None:
        """Called at the start of each epoch, counted from 0."""

    def batch(self, x: torch.Tensor, y: torch.Tensor, change: Callable, generator: torch.Generator):
        """Returns x, y and, for the history, int64 [B] groups (0 clean, 1 poisoned) or None."""
        return change(x), y, None

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
        """A term added to the objective."""
        return None

    def after_step(self) -> None:
        """Called after the optimiser's step."""

    def state_dict(self) -> dict:
        """Tensors and numbers needed to continue."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`."""
