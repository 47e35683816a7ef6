"""The form in which every image dataset is kept: memory-mapped uint8 arrays and a manifest."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cupel.datasets.sources import Source, fetch
from cupel.files import atomic, read_json, write_json

FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy", "manifest.json")


@dataclass(frozen=True)
class Dataset:
    """One split of an image dataset.

    Attributes:
        name: of the dataset.
        images: uint8 [N, H, W, C].
        labels: int64 [N], in [0, len(classes)).
        classes: class names.
    """

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
class Description:
    """What is known of a dataset before it is fetched, and asserted after.

    Attributes:
        name: as used in config and paths.
        classes: class names.
        sources: where raw files come from; `read` of each returns `train_images`, `train_labels`, `test_images`,
            `test_labels`.
        shape: (H, W, C) of an image.
        sizes: number of (train, test) images.
        mean, std: per-channel statistics of the training pixels in [0, 1], for normalisation; `published` says whose.
        measured: (mean, std, tolerance) that the training pixels must have; empty where nothing is published.
        balanced: every class has the same number of samples in each split.
        content: sha256 of the prepared arrays, where every source must give the very same bits.
        licence: terms as stated by the publisher.
        flip: horizontal flips are part of the training augmentation of the papers.
    """

    name: str
    classes: tuple[str, ...]
    sources: tuple[Source, ...]
    shape: tuple[int, int, int]
    sizes: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    published: str = ""
    measured: tuple = ()
    balanced: bool = False
    content: str = ""
    flip: bool = False
    notes: str = field(default="")


def content_digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 over name, shape and bytes of the four arrays."""
    sha = hashlib.sha256()
    for key in sorted(arrays):
        sha.update(f"{key}{arrays[key].shape}{arrays[key].dtype}".encode())
        sha.update(np.ascontiguousarray(arrays[key]).data)
    return sha.hexdigest()


def check(description: Description, arrays: dict[str, np.ndarray]) -> None:
    """Compare prepared arrays with what is published of the dataset.

    Raises:
        ValueError: naming the quantity, what was found and what was expected.
    """
    def expect(what: str, found, expected) -> None:
        if found != expected:
            raise ValueError(f"dataset {description.name}: {what} is {found}, expected {expected}")

    for split, size in zip(("train", "test"), description.sizes, strict=True):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        expect(f"the type of {split} images", str(images.dtype), "uint8")
        expect(f"the type of {split} labels", str(labels.dtype), "int64")
        expect(f"the shape of {split} images", images.shape, (size, *description.shape))
        expect(f"the number of {split} labels", labels.shape, (size,))
        counts = np.bincount(labels, minlength=len(description.classes))
        expect(f"the number of classes in {split}", len(counts), len(description.classes))
        if description.balanced:
            expect(f"the number of {split} images per class", set(counts.tolist()), {size // len(description.classes)})
    if description.measured:
        mean, std, tolerance = description.measured
        images = arrays["train_images"]
        histogram = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
        share, level = histogram / histogram.sum(1, keepdims=True), np.arange(256) / 255
        found_mean = share @ level
        found_std = np.sqrt(share @ level**2 - found_mean**2)
        for what, found, expected in (("mean", found_mean, mean), ("standard deviation", found_std, std)):
            if np.abs(found - expected).max() > tolerance:
                raise ValueError(f"dataset {description.name}: pixel {what} is {found.round(4)}, published {expected}")
    if description.content:
        expect("the sha256 of the content", content_digest(arrays), description.content)


def prepare(description: Description, folder: str | Path, *, kinds: Sequence[str], cache: str | Path | None = None,
            mirror: str | Path | None = None) -> dict:
    """Fetch, check and write a dataset as memory-mappable arrays plus `manifest.json`.

    Returns:
        The manifest.

    Raises:
        NoSource: no source answered with the very dataset.
    """
    source, arrays = fetch(description.name, description.sources, kinds=kinds, cache=cache, mirror=mirror,
                           accept=lambda content: check(description, content))
    folder = Path(folder)
    for key, array in arrays.items():
        with atomic(folder / f"{key}.npy") as path:
            np.save(path, array, allow_pickle=False)
    manifest = {
        "name": description.name,
        "classes": list(description.classes),
        "licence": description.licence,
        "notes": description.notes,
        "source": {"kind": source.kind,
                   "files": [{"name": raw.name, "checksum": raw.checksum, "origin": str(raw.origin or "mirror")}
                             for raw in source.files]},
        "content_sha256": content_digest(arrays),
        "mean": list(description.mean),
        "std": list(description.std),
        "normalisation_source": description.published,
        "flip": description.flip,
        "counts": {split: np.bincount(arrays[f"{split}_labels"], minlength=len(description.classes)).tolist()
                   for split in ("train", "test")},
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def load(folder: str | Path, split: str) -> Dataset:
    """A split of a prepared dataset: images memory-mapped read-only, labels in memory.

    Raises:
        FileNotFoundError: the folder is not a prepared dataset.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} is no prepared dataset; make it with: snakemake --cores 1 {folder}/manifest.json")
    manifest = read_json(folder / "manifest.json")
    return Dataset(
        manifest["name"],
        np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False),
        np.load(folder / f"{split}_labels.npy", allow_pickle=False),
        tuple(manifest["classes"]),
    )
