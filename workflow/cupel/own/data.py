"""Clean images of the user: a folder of pictures, an `.npz`, or a prepared data set, all by one rule of colours and sizes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cupel.images import datasets
from cupel.images.datasets import Dataset, splits
from cupel.images.datasets.folders import centre
from cupel.rng import rng

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
NAMES = {"images": ("images", "x", "x_test", "test_images", "data", "arr_0"),
         "labels": ("labels", "y", "y_test", "test_labels", "targets", "arr_1")}


def coloured(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [N, H, W, C] in 1 or 3 channels: what is transparent lies on black, grey is repeated, colour becomes luminance.

    Args:
        images: uint8 [N, H, W, 1, 3 or 4].
    """
    if images.shape[-1] == channels:
        return images
    if images.shape[-1] == 4:
        images = (images[..., :3] * (images[..., 3:] / 255)).round().astype(np.uint8)
    if images.shape[-1] == 3 and channels == 1:
        return (images @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)[..., None]
    return np.repeat(images, 3, -1) if images.shape[-1] == 1 and channels == 3 else images


def arrays(images, labels, channels: int | None = None, size: int | None = None) -> Dataset:
    """A data set of arrays or tensors.

    Args:
        images: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], or float of these forms in [0, 1], not normalised.
        labels: integers [N].
        channels: that the network takes; None: as they are.
        size: side to bring them to; None: they must be square.

    Raises:
        ValueError: another form, or values out of range.
    """
    images, labels = (np.asarray(array.detach().cpu() if hasattr(array, "detach") else array) for array in (images, labels))
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(f"images of shape {images.shape} and labels of shape {labels.shape}: needed are images [N, H, W, C] "
                         "and as many labels [N]")
    if images.shape[-1] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    if images.shape[-1] not in (1, 3, 4):
        raise ValueError(f"images of shape {images.shape}: they have neither 1, 3 nor 4 channels")
    if np.issubdtype(images.dtype, np.floating):
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"float images must be pixels in [0, 1], and these reach from {images.min():.3g} to "
                             f"{images.max():.3g}: give them before normalisation")
        images = (images * 255).round().astype(np.uint8)
    if images.dtype != np.uint8:
        if images.min() < 0 or images.max() > 255:
            raise ValueError(f"images of type {images.dtype} reach from {images.min()} to {images.max()}, not from 0 to 255")
        images = images.astype(np.uint8)
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError("labels must be integers from 0 on")
    images = coloured(images, channels) if channels else images
    if size and images.shape[1:3] != (size, size):
        images = np.stack([np.asarray(centre(Image.fromarray(image.squeeze()), size, size)) for image in images])
        images = images.reshape(len(images), size, size, -1)
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"images of {images.shape[1]}×{images.shape[2]} pixels are not square: say to which size they are "
                         "to be brought (--size: the shorter side is resized, and the centre kept)")
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    return Dataset("own", np.ascontiguousarray(images), labels.astype(np.int64), classes)


def _pictures(files: list[Path], size: int | None) -> Iterator[np.ndarray]:
    expected = None
    for file in files:
        try:
            with Image.open(file) as picture:
                if picture.mode in ("I", "F", "I;16"):
                    raise ValueError(f"{file} has more than 8 bits a channel, which has no one meaning: convert it first")
                picture = picture.convert("RGBA")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} cannot be read as a picture ({error})") from None
        picture = centre(picture, size, size) if size else picture
        expected = expected or picture.size
        if picture.size != expected:
            raise ValueError(f"pictures differ in size: {file} has {picture.size[0]}×{picture.size[1]} pixels, earlier ones "
                             f"{expected[0]}×{expected[1]}; say to which size they are to be brought (--size)")
        yield np.asarray(picture)


def folder(path: Path, channels: int, size: int | None) -> Dataset:
    """Pictures in one folder per class: named by the number of the class, or by words, which count in the order of sorting.

    Raises:
        ValueError: there are none, or they cannot be used.
    """
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    numbered = bool(classes) and all(entry.name.isdigit() for entry in classes)
    files, labels = [], []
    for k, entry in enumerate(classes):
        inside = sorted(file for file in entry.rglob("*") if file.suffix.lower() in PICTURES)
        files += inside
        labels += [int(entry.name) if numbered else k] * len(inside)
    if not files:
        raise ValueError(f"{path}: no pictures in folders, one a class, are here")
    found = replace(arrays(np.stack(list(_pictures(files, size))), np.array(labels), channels), name=str(path))
    return found if numbered else replace(found, classes=tuple(entry.name for entry in classes))


def read(source: str | Path, channels: int = 3, size: int | None = None) -> Dataset:
    """Clean images from a folder of pictures, an `.npz` with images and labels, or the test set of a prepared data set.

    Args:
        source: path.
        channels: that the network takes, 1 or 3.
        size: side to which images are brought; None: they are taken as they are.

    Raises:
        ValueError: it is none of these, or does not hold what is needed.
    """
    path = Path(source)
    if size is not None and size < 1:
        raise ValueError(f"size {size}: a picture has at least one pixel")
    if path.is_dir():
        if not (path / "manifest.json").is_file():
            return folder(path, channels, size)
        test = datasets.load(path, "test")
        return replace(arrays(test.images, test.labels, channels, size), name=f"test set of {test.name}", classes=test.classes)
    if not path.is_file():
        raise ValueError(f"there is nothing at {source}: give a folder of pictures, an .npz, or a prepared data set")
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = {part: next((key for key in names if key in file.files), None) for part, names in NAMES.items()}
            if None in keys.values():
                raise ValueError(f"{path} has the arrays {', '.join(file.files)}: images and labels are looked for")
            return replace(arrays(file[keys["images"]], file[keys["labels"]], channels, size), name=str(path))
    except (OSError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no .npz of arrays ({error})") from None


def parts(clean: Dataset, share: float, spc: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """A part to tune on, `share` of every class and at most `spc` images of it, and the part that measures, which `spc` leaves.

    Raises:
        ValueError: one of the two is empty, unless all are asked for.
    """
    if spc is not None and spc < 1:
        raise ValueError(f"spc {spc}: at least one image of each class is needed to tune on")
    size, everything = round(share * len(clean)), np.arange(len(clean))
    if not 0 < size < len(clean) and share != 1:
        raise ValueError(f"{len(clean)} clean images cannot be divided into {share:g} to tune on and the rest to measure")
    chosen = splits.stratified(clean.labels, everything, size, rng(seed, "own", "parts"))
    held = clean.take(np.setdiff1d(everything, chosen))
    if spc is not None:
        order = rng(seed, "own", "spc").permutation(chosen)
        chosen = np.sort(np.concatenate([order[clean.labels[order] == c][:spc] for c in np.unique(clean.labels)]))
    return clean.take(chosen), held
