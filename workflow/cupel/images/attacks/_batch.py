"""What attacks share that act while the victim trains (WaNet, BPP, Input-aware, Bypass)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.images.attacks.base import Attack, AttackHook
from cupel.training.augment import to_pixels
from cupel.training.engine import upload


class BatchHook(AttackHook):
    """Poisons the first samples of each batch; the order of an epoch is random, so these are random samples.

    Args:
        poison_rate: share p of each batch to poison. int(p·B) of B samples are poisoned; where p·B < 1, one sample with
            probability p·B (backdoorbench SPEC 4).
        seed: of the trigger's random parts, where it has any.
        cover: share of each batch that is changed and keeps its label.

    Raises:
        ValueError: the label policy does not relabel, or a batch cannot hold the shares asked for.
    """

    def __init__(self, attack: Attack, poison_rate: float, target: int, classes: int, *, seed: int, cover: float):
        if attack.policy not in ("all2one", "all2all"):
            raise ValueError(f"{type(attack).__name__} relabels what it poisons: policy must be all2one or all2all, "
                             f"not {attack.policy!r}")
        if not 0 <= poison_rate <= 1 or poison_rate + cover > 1 + 1e-9:
            raise ValueError(f"{type(attack).__name__} at rate {poison_rate:g} changes {cover:g} of each batch besides, and "
                             "both together may be at most 1: choose a lower rate")
        self.attack, self.poison_rate, self.target, self.classes, self.seed = attack, poison_rate, target, classes, seed

    def draw(self, size: int, generator: torch.Generator) -> int:
        """How many of the next `size` samples to poison; they are counted."""
        expected = self.poison_rate * size
        number = int(expected) if expected >= 1 else int(torch.rand((), generator=generator).item() < expected)
        self.count(size, number)
        return number

    def relabelled(self, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Labels int64 [B] whose first `number` are the attacker's, and the groups int64 [B]: 1 there, else 0."""
        wanted, groups = labels.clone(), torch.zeros_like(labels)
        wanted[:number] = self.target if self.attack.policy == "all2one" else (labels[:number] + 1) % self.classes
        groups[:number] = 1
        return wanted, groups


def rotate(images: Tensor, angle: float) -> Tensor:
    """Float [B, C, H, W], H = W, turned by `angle` radians about the centre: nearest neighbour, 0 outside."""
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = images.new_tensor([[cosine, -sine, 0], [sine, cosine, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def augment_batch(images: Tensor, generator: torch.Generator, *, crop: int, rotation: float, flip: bool) -> Tensor:
    """The augmentation of WaNet and BPP: one draw for the whole batch, after the trigger (backdoorbench SPEC 4).

    With probability 0.8 a random crop, then with 0.5 a rotation, then with 0.5 a horizontal flip. What
    comes in from outside the image is 0.

    Args:
        images: float [B, C, H, W], H = W; the same is returned.
        crop: zero padding of the crop, in pixels.
        rotation: largest angle, in degrees.
        flip: flips happen at all (they do on CIFAR-10 alone).
    """
    # all numbers are drawn, used or not: a parameter then never shifts the stream
    cropped, turned, flipped = (torch.rand(3, generator=generator) < torch.tensor([0.8, 0.5, 0.5])).tolist()
    row, column = torch.randint(0, 2 * crop + 1, (2,), generator=generator).tolist()
    angle = math.radians(rotation) * (2 * torch.rand((), generator=generator).item() - 1)
    height, width = images.shape[-2:]
    if crop and cropped:
        images = F.pad(images, (crop,) * 4)[..., row : row + height, column : column + width]
    if rotation and turned:
        images = rotate(images, angle)
    if flip and flipped:
        images = images.flip(3)
    return images.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Augmenting(Attack):
    """What WaNet and BPP share: batches are poisoned before they are augmented.

    Attributes:
        random_crop, random_rotation, flip: the attack's augmentation, see `augment_batch` (5 pixels, 10 degrees;
            flips on CIFAR-10 alone).
        own_augmentation: with this augmentation, as published; without, the recipe's is used.
    """

    random_crop: int = 5
    random_rotation: float = 10.0
    flip: bool = True
    own_augmentation: bool = True

    batchwise = True


class AugmentingHook(BatchHook):
    """Poisons batches and then augments them."""

    kept = (*BatchHook.kept, "mean")

    def start(self, model, images, labels):
        self.mean = model.normalize.mean

    def augmented(self, images: Tensor, change: Callable, generator: torch.Generator) -> Tensor:
        """Float [B, C, H, W] to the same; `change` is the recipe's augmentation.

        The released code augments normalised images, where 0 is the mean colour: so is what comes in from outside.
        """
        attack = self.attack
        if not attack.own_augmentation:
            return change(images)
        return augment_batch(images - self.mean, generator, crop=attack.random_crop, rotation=attack.random_rotation,
                             flip=attack.flip) + self.mean


def others(first: int, count: int, size: int, generator: torch.Generator) -> Tensor:
    """For each of the samples first, …, first + count − 1 of a batch of `size`, another one: int64 [count]."""
    # an empty draw is legal for a batch of one sample
    return (torch.arange(first, first + count) + torch.randint(1, max(size, 2), (count,), generator=generator)) % size


def arrays(name: str, network: nn.Module) -> dict[str, np.ndarray]:
    """The weights of a network under `<name>.`, for `Attack.tensors`."""
    return {f"{name}.{key}": value.cpu().numpy() for key, value in network.state_dict().items()}


def stored(attack: Attack, name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` makes, in eval mode, with its weights out of `attack.tensors`, see `arrays`.

    Raises:
        ValueError: there are none yet.
    """
    with torch.device("meta"):  # no weights are drawn, so neither time nor random numbers are spent
        network = build()
    network.load_state_dict({key: torch.tensor(attack.made(f"{name}.{key}")) for key in network.state_dict()}, assign=True)
    return network.eval()


def stamp_pixels(images: np.ndarray, trigger: Callable[[Tensor], Tensor], size: int = 500, device: str = "cpu") -> np.ndarray:
    """Apply a trigger on float pixels [B, C, H, W] in [0, 1] to uint8 [N, H, W, C], in parts of `size`.

    The result is rounded to the nearest level: these attacks train on floats, and the rounded test image is the nearest
    to what the victim saw. (The released scripts truncate, which darkens by half a level on average.)
    """
    stamped = np.empty(images.shape, np.uint8)
    with torch.inference_mode():
        for start in range(0, len(images), size):
            levels = trigger(to_pixels(upload(images[start : start + size], device))).mul(255).round_().clamp_(0, 255)
            stamped[start : start + size] = levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return stamped
