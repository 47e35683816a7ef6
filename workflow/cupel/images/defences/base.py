"""What a defender is given, and nothing else: the victim, some clean images, and a random stream."""

import copy
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from cupel.registry import Registry
from cupel.training.engine import Recipe
from cupel.training.resume import Resume

defence = Registry("defence", "cupel.images.defences")


@dataclass(frozen=True)
class Budget:
    """The defender's clean data and machine.

    Attributes:
        images: uint8 [N, H, W, C], clean.
        labels: int64 [N], true.
        classes: number of classes.
        crop, flip: the augmentation of the data set, which the papers assume known.
        device: where to compute.
        precision: `fp32` or `bf16`, for training passes.
        checkpoint: file for long runs to continue from, or None. `purify` makes a `Resume` of it, which knows the run.
        details, snapshots: what `keep` and `snapshot` were given.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int
    crop: int = 4
    flip: bool = True
    device: str = "cpu"
    precision: str = "fp32"
    checkpoint: str | Resume | None = None
    details: dict[str, np.ndarray] = field(default_factory=dict)
    snapshots: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Budget":
        """The budget reduced to `indices`."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def split(self, ratio: float, rng: np.random.Generator) -> tuple["Budget", "Budget"]:
        """A training and a validation part: max(1, int(ratio·n)) validation images of each class of n (ims SPEC 4).

        A class with a single image stays in the training part.

        Raises:
            ValueError: no class has two images.
        """
        held = []
        for c in range(self.classes):
            members = rng.permutation(np.flatnonzero(self.labels == c))
            if len(members) > 1:
                held.append(members[: max(1, int(ratio * len(members)))])
        if not held:
            raise ValueError("it sets images of each class aside to choose by, and no class has two: a larger budget")
        validation = np.sort(np.concatenate(held))
        return self.take(np.setdiff1d(np.arange(len(self)), validation)), self.take(validation)

    def copy_of(self, network: torch.nn.Module) -> torch.nn.Module:
        """A copy of the victim, or of another network, on this budget's device: what a defence may change."""
        return copy.deepcopy(network).to(self.device)

    def keep(self, **arrays: np.ndarray) -> None:
        """Leave arrays for figures: the workflow writes them as `details.npz` beside the checkpoint."""
        self.details.update(arrays)

    def snapshot(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Leave an intermediate network: the workflow measures it too, as `acc_<name>`, `asr_<name>` and `ra_<name>`.

        Args:
            tensors: by name in the `state_dict` of the returned network, those that are other than there.
        """
        self.snapshots[name] = tensors

    def resume(self, **parts) -> Resume:
        """What lets a killed run go on, holding `parts`; see `Resume`."""
        return (self.checkpoint if isinstance(self.checkpoint, Resume) else Resume(None, {})).hold(**parts)

    def recipe(self, epochs: int, lr: float, **settings) -> Recipe:
        """A training recipe with this budget's augmentation and precision."""
        return Recipe(epochs=epochs, lr=lr, **{"crop": self.crop, "flip": self.flip, "precision": self.precision,
                                               **settings})
