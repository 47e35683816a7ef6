"""What every attack has in common: which images are poisoned, with which label, and the record of it.

What an attack does not say itself is said here: samples are drawn as FST and BackdoorBench draw them (fst SPEC 3,
backdoorbench SPEC 3).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from cupel.files import atomic
from cupel.images.datasets import Dataset
from cupel.registry import Registry
from cupel.training.hook import Hook

attack = Registry("attack", "cupel.images.attacks")


class ImpossibleRate(ValueError):
    """More samples are asked for than the label policy allows; the text gives the largest possible rate."""


@dataclass(frozen=True)
class PoisonRecord:
    """What poisoning changed in a training set of `total` samples; everything else stays as it was.

    Attributes:
        indices: int64 [P], into the training set, ascending.
        images: uint8 [P, H, W, C], the stamped images.
        labels: int64 [P], labels after poisoning.
        original: int64 [P], labels before.
        cover: bool [P], samples that are stamped but keep their label.
        target: the target label.
        total: size of the training set.
        poison_rate: the rate asked for.

    Raises:
        ValueError: images of another type, which would be cut to whole numbers.
    """

    indices: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    original: np.ndarray
    cover: np.ndarray
    target: int
    total: int
    poison_rate: float

    def __post_init__(self):
        if self.images.dtype != np.uint8:
            raise ValueError(f"poisoned images are uint8, not {self.images.dtype}")

    @property
    def rate_reached(self) -> float:
        """Poisoned samples without cover, over all."""
        return float((~self.cover).sum() / self.total)

    def save(self, path: str | Path) -> None:
        """Write as `.npz`, atomically."""
        with atomic(path) as temporary:
            np.savez_compressed(temporary, **vars(self))

    @classmethod
    def load(cls, path: str | Path) -> "PoisonRecord":
        """Read what `save` wrote; nothing is unpickled."""
        with np.load(path, allow_pickle=False) as file:
            content = dict(file)
        for key, kind in (("target", int), ("total", int), ("poison_rate", float)):
            content[key] = kind(content[key])
        return cls(**content)

    @classmethod
    def empty(cls, dataset: Dataset, poison_rate: float, target: int) -> "PoisonRecord":
        """Nothing poisoned in advance: clean training, or an attack that poisons batches."""
        none = np.zeros(0, np.int64)
        return cls(none, np.zeros((0, *dataset.images.shape[1:]), np.uint8), none, none, np.zeros(0, bool), target,
                   len(dataset), poison_rate)


def relabel(labels: np.ndarray, target: int, policy: str, classes: int) -> np.ndarray:
    """Labels after poisoning: `all2one` gives the target, `all2all` gives (y + 1) mod K, `clean` changes nothing."""
    if policy == "all2one":
        return np.full_like(labels, target)
    if policy == "all2all":
        return (labels + 1) % classes
    if policy == "clean":
        return labels.copy()
    raise ValueError(f"unknown label policy {policy!r}: known are all2one, all2all, clean")


def choose(labels: np.ndarray, poison_rate: float, target: int, policy: str, rng: np.random.Generator) -> np.ndarray:
    """Indices of the samples to poison, ascending.

    Dirty-label policies draw round(rate·N) samples from all classes, the target class included; `clean` draws as many
    from the target class alone, the rate still counted over the whole training set.

    Raises:
        ImpossibleRate: `clean` and the target class is too small, or the rate gives no sample.
    """
    count = round(poison_rate * len(labels))
    if not count:
        raise ImpossibleRate(f"rate {poison_rate:g} of {len(labels)} samples is not one sample: nothing would be poisoned")
    pool = np.flatnonzero(labels == target) if policy == "clean" else np.arange(len(labels))
    if count > len(pool):
        raise ImpossibleRate(
            f"a clean-label attack at rate {poison_rate:g} needs {count} images of class {target}, which has {len(pool)} "
            f"of {len(labels)}: the largest possible rate is {int(len(pool) / len(labels) * 1e5) / 1e5:g}")
    return np.sort(rng.choice(pool, count, replace=False))


def changed(images: np.ndarray, stamped: np.ndarray) -> np.ndarray:
    """The stamped images, if they are images and carry something.

    Raises:
        ValueError: they are not uint8 of the same shape (floats in [0, 1] would be read as levels of 255), or no pixel changed.
    """
    if stamped.dtype != np.uint8 or stamped.shape != images.shape:
        raise ValueError(f"stamped images are {stamped.dtype} {stamped.shape}, not uint8 {images.shape}")
    if np.array_equal(stamped, images):
        raise ValueError("the trigger changes no pixel of any image")
    return stamped


@dataclass(frozen=True)
class Attack:
    """A backdoor attack. Subclasses are frozen dataclasses whose fields are the attack's parameters.

    There are three kinds, told apart by what a subclass defines beside `stamp`:

    - a fixed trigger: nothing more (BadNets, Blended, SIG);
    - a trigger that is computed or trained beforehand: `prepare`, and what it needs in `needs` (LF, SSBA, TrojanNN);
    - poisoning while the victim trains: `hook` (WaNet, Input-aware, BPP), and the record is empty.

    Attributes:
        policy: label policy, `all2one`, `all2all` or `clean` (see `relabel`).
        tensors: arrays that the trigger is made of, from `prepare` or from the hook; they are stored with the victim,
            so that its trigger is never computed anew. Empty where a formula is enough. Not a parameter.
    """

    policy: str = "all2one"
    tensors: dict = field(default_factory=dict, compare=False, repr=False)

    #: what `prepare` must be given: "" (no preparation), "data", or "clean_model" (a network trained on clean data)
    needs: ClassVar[str] = ""
    #: poisoning happens batch by batch, in training
    batchwise: ClassVar[bool] = False

    def made(self, name: str) -> np.ndarray:
        """The array `name` of `tensors`.

        Raises:
            ValueError: there is none yet.
        """
        if name not in self.tensors:
            raise ValueError(f"{type(self).__name__} has no {name} yet: call prepare(), or train a victim with its hook, and "
                             "keep the arrays in `tensors`")
        return self.tensors[name]

    def stamp(self, images: np.ndarray) -> np.ndarray:
        """Put the trigger on uint8 [N, H, W, C]; returns a new array of the same form."""
        raise TypeError(f"{type(self).__name__} defines no stamp()")

    def stamp_training(self, dataset: Dataset, indices: np.ndarray) -> np.ndarray:
        """Stamped training images uint8 [P, H, W, C] at `indices`, where training differs from test time."""
        return self.stamp(np.asarray(dataset.images[indices]))

    def prepare(self, dataset: Dataset, model, target: int, seed: int, *, device: str = "cpu",
                smaller: float = 1.0) -> dict[str, np.ndarray]:
        """Compute the arrays for `tensors` from clean training data (and a network trained on it).

        Args:
            dataset: the victim's training set, clean.
            model: `cupel.images.models.Classifier` trained on `dataset`, or None where `needs` does not ask for one.
            smaller: share of the stated work (iterations, epochs) to do, for small scales; 1 is as published.
        """
        return {}

    def hook(self, poison_rate: float, target: int, classes: int, seed: int) -> "AttackHook | None":
        """The training hook of a batch-wise attack, else None."""
        return None

    def poison(self, dataset: Dataset, poison_rate: float, target: int, rng: np.random.Generator) -> PoisonRecord:
        """Choose and stamp samples of a training set.

        Raises:
            ImpossibleRate: see `choose`.
            ValueError: see `changed`.
        """
        if self.batchwise:
            return PoisonRecord.empty(dataset, poison_rate, target)
        indices = choose(dataset.labels, poison_rate, target, self.policy, rng)
        original = dataset.labels[indices]
        return PoisonRecord(indices, changed(dataset.images[indices], self.stamp_training(dataset, indices)),
                            relabel(original, target, self.policy, len(dataset.classes)), original,
                            np.zeros(len(indices), bool), target, len(dataset), poison_rate)

    def test_set(self, dataset: Dataset, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Triggered test images: those whose true class is not the target (all of them under `all2all`).

        Returns:
            stamped uint8 [M, H, W, C], labels the attacker wants int64 [M], true labels int64 [M].
        """
        keep = np.arange(len(dataset)) if self.policy == "all2all" else np.flatnonzero(dataset.labels != target)
        true = np.asarray(dataset.labels[keep])
        wanted = relabel(true, target, "all2all" if self.policy == "all2all" else "all2one", len(dataset.classes))
        images = np.asarray(dataset.images[keep])
        return changed(images, self.stamp(images)), wanted, true


class AttackHook(Hook):
    """A training hook that poisons batches. It counts what it poisons, so that the true rate is known."""

    #: names of the attributes that a continued run needs
    kept: ClassVar[tuple[str, ...]] = ("seen", "poisoned")
    seen = poisoned = 0

    def count(self, seen: int, poisoned) -> None:
        """Add the samples of a batch; `poisoned` may be a tensor on the device."""
        self.seen, self.poisoned = self.seen + seen, self.poisoned + poisoned

    @property
    def rate_reached(self) -> float:
        """Poisoned samples over all samples seen so far."""
        return float(self.poisoned / self.seen) if self.seen else 0.0

    def tensors(self) -> dict[str, np.ndarray]:
        """Arrays for `Attack.tensors`, after training."""
        return {}

    def state_dict(self) -> dict:
        return {**{name: getattr(self, name) for name in self.kept}, "poisoned": int(self.poisoned)}

    def load_state_dict(self, state: dict) -> None:
        for name in self.kept:
            setattr(self, name, state[name])


def quantise(images: np.ndarray) -> np.ndarray:
    """Clip float pixels on the 0..255 scale and truncate to uint8, as the released attacks store PNGs."""
    return np.clip(images, 0, 255).astype(np.uint8)
