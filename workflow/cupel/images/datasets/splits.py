"""Who sees which training image: the victim's training set and the defender's clean budget."""

from dataclasses import dataclass

import numpy as np

from cupel.images.datasets.base import Dataset
from cupel.rng import rng


@dataclass(frozen=True)
class Split:
    """Indices into the original training set, int64."""

    train: np.ndarray  # what the victim is trained on (before poisoning), in dataset order
    held_out: np.ndarray  # disjoint from `train`, never seen by the victim


def hold_out(labels: np.ndarray, ratio: float, seed: int, order: str = "first") -> np.ndarray:
    """Indices of the tuning set that is left out of victim training: the share `ratio` of images with labels int64 [N].

    `order` is `first`, the first floor(N/K)·ratio images of every class in dataset order (FST's code at the time of the paper;
    no `seed` matters), or `random`, int(N·ratio) images drawn uniformly (FST's later code, which does not remove them).
    """
    n, classes = len(labels), int(labels.max()) + 1
    if order == "random":
        return np.sort(rng(seed, "hold_out").permutation(n)[: int(n * ratio)])
    quota = int(n // classes * ratio + 1e-9)
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:quota] for c in range(classes)]))


def split(labels: np.ndarray, *, held_out: float, train_size: int | None, seed: int, order: str = "first",
          remove: bool = True) -> Split:
    """The victim's training set and the held-out set.

    Args:
        labels: int64 [N] of the original training set.
        held_out: share held out (0 for IMS, 0.02 for FST).
        train_size: number of images to keep for training, a class-stratified random draw (small scales); None: all.
        seed: of the named streams `hold_out` and `subset`.
        order: see `hold_out`.
        remove: whether held-out images leave the training set (they do in FST's paper; not in its later code).
    """
    apart = hold_out(labels, held_out, seed, order) if held_out else np.zeros(0, np.int64)
    train = np.setdiff1d(np.arange(len(labels)), apart) if remove else np.arange(len(labels))
    if train_size is not None and train_size < len(train):
        train = stratified(labels, train, train_size, rng(seed, "subset"))
    return Split(train, apart)


def stratified(labels: np.ndarray, pool: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """`size` indices out of `pool`, every class represented by its share (largest remainders), in dataset order."""
    classes = [pool[labels[pool] == c] for c in range(int(labels.max()) + 1)]
    share = np.array([len(members) for members in classes]) * size / len(pool)
    counts = np.floor(share).astype(int)
    counts[np.argsort(counts - share, kind="stable")[: size - counts.sum()]] += 1
    return np.sort(np.concatenate([generator.permutation(members)[:count]
                                   for members, count in zip(classes, counts, strict=True)]))


def test_subset(test: Dataset, size: int | None) -> Dataset:
    """The test set, or a fixed class-stratified part of it (the same for all cells, seeds and defences)."""
    if size is None or size >= len(test):
        return test
    return test.take(stratified(test.labels, np.arange(len(test)), size, rng(0, "test_subset")))


def per_class(labels: np.ndarray, pool: np.ndarray, spc: int, seed: int) -> np.ndarray:
    """`spc` (samples per class) indices of every class out of `pool`, drawn from the stream `spc` (ims SPEC 4).

    Streams are nested: the draw for a smaller `spc` is part of the draw for a larger one with the same seed.

    Raises:
        ValueError: a class has too few samples; the text gives the largest possible `spc`.
    """
    chosen = []
    for c in range(int(labels.max()) + 1):
        members = pool[labels[pool] == c]
        if len(members) < spc:
            raise ValueError(f"{spc} samples per class asked for, but class {c} has {len(members)}: "
                             f"choose spc ≤ {len(members)}")
        chosen.append(rng(seed, "spc", c).permutation(members)[:spc])
    return np.sort(np.concatenate(chosen))
