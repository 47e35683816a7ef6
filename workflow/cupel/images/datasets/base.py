"""The form in which every image dataset is kept: memory-mapped uint8 arrays and a manifest."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupel.files import read_json, scratch
from cupel.prepared import begin, finish, opened
from cupel.sources import Source, fetch

FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy", "manifest.json")


class DamagedDataset(OSError):
    """A prepared file is not whole. No fault of a method, so no cell is recorded as failed for it."""


@dataclass(frozen=True)
class Dataset:
    """One split of an image dataset: images, uint8 [N, H, W, C], and labels, int64 [N], in [0, len(classes))."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """Height of the (square) images, in pixels."""
        return self.images.shape[1]

    def take(self, indices: np.ndarray) -> "Dataset":
        """The samples at `indices`, copied into memory in that order."""
        return Dataset(self.name, np.asarray(self.images[indices]), np.asarray(self.labels[indices]), self.classes)


@dataclass(frozen=True)
class Deferred:
    """Images that a reader has not decoded yet, so that they can be written to disk without being held in memory.

    `shape` is (N, H, W, C), and `fill` writes all images into a uint8 array of that shape.
    """

    shape: tuple[int, int, int, int]
    fill: Callable[[np.ndarray], None]


@dataclass(frozen=True)
class Description:
    """What is known of a dataset before it is fetched, and asserted after."""

    name: str  # as used in config and paths
    classes: tuple[str, ...]
    #: `read` of each gives `train_images`, `train_labels`, `test_images`, `test_labels`; images may be `Deferred`
    sources: tuple[Source, ...]
    shape: tuple[int, int, int]  # (H, W, C) of an image
    sizes: tuple[int | None, int | None]  # number of (train, test) images; None where no source gives it
    mean: tuple[float, ...]  # of each channel of the training pixels in [0, 1], for normalisation
    std: tuple[float, ...]
    licence: str  # terms as stated by the publisher
    published: str = ""  # whose `mean` and `std` these are
    measured: tuple = ()  # (mean, std, tolerance) that the training pixels must have; empty where nothing is published
    balanced: bool = False  # every class has the same number of samples in each split
    counts: tuple[tuple[int, ...], ...] = ()  # published number of images of each class, (train, test), where they differ
    content: str = ""  # sha256 of the prepared arrays, where every source must give the very same bits
    flip: bool = False  # horizontal flips are part of the training augmentation of the papers
    notes: str = ""
    excerpts: tuple[Source, ...] = ()  # sources of a known part of the dataset, for `prepare(..., excerpt=True)`


def both(train: tuple, test: tuple) -> dict:
    """What `read` of a source gives, from images and labels of each split."""
    return {"train_images": train[0], "train_labels": train[1], "test_images": test[0], "test_labels": test[1]}


def content_digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 over name, shape and bytes of the four arrays."""
    sha = hashlib.sha256()
    for key in sorted(arrays):
        sha.update(f"{key}{arrays[key].shape}{arrays[key].dtype}".encode())
        sha.update(np.ascontiguousarray(arrays[key]).data)
    return sha.hexdigest()


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float64 [C], of uint8 images [N, H, W, C] scaled to [0, 1]."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    for start in range(0, len(images), 1000):  # it works on a copy of eight bytes a pixel
        scaler.partial_fit(images[start : start + 1000].reshape(-1, images.shape[-1]))
    return scaler.mean_ / 255, np.sqrt(scaler.var_) / 255


def check(description: Description, arrays: dict[str, np.ndarray], excerpt: bool = False) -> None:
    """Compare prepared arrays with what is published of the dataset; of an excerpt only types, image shape and label range.

    Raises:
        ValueError: naming the quantity, what was found and what was expected.
    """
    def expect(what: str, found, expected) -> None:
        if found != expected:
            raise ValueError(f"dataset {description.name}: {what} is {found}, expected {expected}")

    classes = len(description.classes)
    for k, split in enumerate(("train", "test")):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        size = len(images) if excerpt or description.sizes[k] is None else description.sizes[k]
        expect(f"the type of {split} images", str(images.dtype), "uint8")
        expect(f"the type of {split} labels", str(labels.dtype), "int64")
        expect(f"the shape of {split} images", images.shape, (size, *description.shape))
        expect(f"the number of {split} labels", labels.shape, (size,))
        if not size or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"dataset {description.name}: {split} labels are missing or not in 0..{classes - 1}")
        if excerpt:
            continue
        counts = np.bincount(labels, minlength=classes).tolist()
        if description.balanced:
            expect(f"the number of {split} images per class", set(counts), {size // classes})
        if description.counts:
            for c, (found, expected) in enumerate(zip(counts, description.counts[k], strict=True)):
                expect(f"the number of {split} images of class {c}", found, expected)
    if excerpt:
        return
    if description.measured:
        mean, std, tolerance = description.measured
        found_mean, found_std = moments(arrays["train_images"])
        for what, found, expected in (("mean", found_mean, mean), ("standard deviation", found_std, std)):
            if np.abs(found - expected).max() > tolerance:
                raise ValueError(f"dataset {description.name}: pixel {what} is {found.round(4)}, published {expected}")
    if description.content:
        expect("the sha256 of the content", content_digest(arrays), description.content)


def _write(value: "np.ndarray | Deferred", path: Path) -> np.ndarray:
    """Write an array and return it memory-mapped."""
    if isinstance(value, Deferred):
        out = np.lib.format.open_memmap(path, "w+", np.uint8, value.shape)
        value.fill(out)
        out.flush()
    else:
        np.save(path, value, allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def prepare(description: Description, folder: str | Path, *, kinds: Sequence[str], cache: str | Path | None = None,
            mirror: str | Path | None = None, excerpt: bool = False) -> dict:
    """Fetch, check and write a dataset as memory-mappable arrays plus `manifest.json`, which is returned.

    `kinds`, `cache` and `mirror` are those of `cupel.sources.fetch`. An `excerpt` is a known part of the dataset
    (`description.excerpts`); its manifest says so, and names only the classes up to the last one present.

    Raises:
        NoSource: no source answered with the very dataset.
        ValueError: no excerpt of the dataset is known.
    """
    sources = description.excerpts if excerpt else description.sources
    if not sources:
        raise ValueError(f"dataset {description.name}: no excerpt of it is known")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    with scratch(folder, ".prepare-") as workspace:
        def accept(content: dict) -> None:
            arrays.clear()
            arrays.update({key: _write(value, workspace / f"{key}.npy") for key, value in content.items()})
            check(description, arrays, excerpt)

        source, _ = fetch(description.name, sources, kinds=kinds, cache=cache, mirror=mirror, accept=accept)
        labels = {split: arrays[f"{split}_labels"] for split in ("train", "test")}
        last = max(int(values.max()) for values in labels.values())
        classes = description.classes[: last + 1] if excerpt else description.classes
        return finish(begin(folder), {
            **{key: getattr(description, key) for key in ("name", "licence", "notes", "flip")},
            "classes": list(classes),
            "mean": list(description.mean),
            "std": list(description.std),
            "normalisation_source": description.published,
            "excerpt": excerpt,
            "source": source.said(),
            "content_sha256": content_digest(arrays),
            "counts": {split: np.bincount(values, minlength=len(classes)).tolist() for split, values in labels.items()},
        }, workspace)


def load(folder: str | Path, split: str) -> Dataset:
    """A split of a prepared dataset: images memory-mapped read-only, labels in memory.

    Raises:
        FileNotFoundError: the folder is not a prepared dataset.
        DamagedDataset: a file of it is not what `prepare` wrote.
    """
    folder = opened(folder)
    try:
        manifest = read_json(folder / "manifest.json")
        images = np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(f"{split} images of shape {images.shape} with labels of shape {labels.shape}")
        return Dataset(manifest["name"], images, labels, tuple(manifest["classes"]))
    except (ValueError, EOFError, KeyError, OSError) as error:
        raise DamagedDataset(f"{folder} is damaged ({error}); remove the folder and run the same command again") from None
