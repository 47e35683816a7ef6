"""Image-text data as every stage reads it: records in JSON lines, pictures, and a manifest.

A prepared folder holds

    <split>.jsonl   one record a line: id, image, question, answer, split, and for captions answers (all references)
    images.npy      uint8 [M, H, W, 3], memory-mapped, where all pictures have one size; the image of a record is then
                    `images.npy#<row>`
    images/         otherwise: one PNG per picture, the image of a record is `images/<row>.png`
    manifest.json   see `cupel.prepared`

`question` is the whole text of the user's turn (body and suffix, bye SPEC 4) without chat template and image token.
Pictures are kept lossless, as decoded from the source: whatever is painted on some of them later leaves no trace of a
second JPEG compression. All PNGs come from one encoder with one setting.
"""

import hashlib
import io
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from cupel.files import link, read_json, reading, scratch, write_json
from cupel.prepared import begin, complete, finish, lines, opened, read_records

_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def decode(content: bytes) -> np.ndarray:
    """The pixels of an image file (PNG, JPEG, TIFF), uint8 [H, W, 3]; transparency is dropped, as the papers' code does.

    Raises:
        ValueError: not an image of 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "TIFF")) as picture:
            if picture.mode not in _EIGHT_BIT:
                raise ValueError(f"an image of mode {picture.mode}, but 8 bits per channel are expected")
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"not a readable image: {error}") from None


def encode(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 [H, W, 3]: the one way in which any picture, clean or triggered, becomes a file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@lru_cache(maxsize=16)
def _mapped(path: str, modified: int) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def read_picture(folder: str | Path, reference: str) -> np.ndarray:
    """The picture of a record, uint8 [H, W, 3], read-only.

    Raises:
        ValueError: the reference leads out of the folder.
        Damaged: the picture cannot be read.
    """
    file, _, row = reference.partition("#")
    path = Path(folder) / file
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"image {reference!r} lies outside {folder}")
    with reading(path):
        return _mapped(str(path), path.stat().st_mtime_ns)[int(row)] if row else decode(path.read_bytes())


class Pictures:
    """Writes the pictures of one folder, packed into `images.npy` or as files `images/<row>.png`, and their digest.

    Args:
        folder: where to write; exists.
        count: how many pictures there will be.
        size: height and width for packing, or None for files.
    """

    def __init__(self, folder: Path, count: int, size: tuple[int, int] | None):
        self.folder, self.size, self.digests = folder, size, [b""] * count
        if size:
            self.array = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, *size, 3))
        else:
            (folder / "images").mkdir()

    def reference(self, row: int) -> str:
        """What the record of a sample says of its picture."""
        return f"images.npy#{row}" if self.size else f"images/{row:06d}.png"

    def put(self, row: int, pixels: np.ndarray) -> None:
        """Write uint8 [H, W, 3].

        Raises:
            ValueError: another size than that of the packed pictures.
        """
        if self.size:
            if pixels.shape != (*self.size, 3):
                raise ValueError(f"a picture of the shape {pixels.shape}, expected {(*self.size, 3)}")
            self.array[row] = pixels
        else:
            (self.folder / self.reference(row)).write_bytes(encode(pixels))
        self._note(row, pixels)

    def take(self, row: int, folder: Path, reference: str) -> None:
        """Take over a picture from a folder written by this class, without writing files anew where links are possible."""
        pixels = read_picture(folder, reference)
        if self.size:
            self.put(row, pixels)
            return
        link(Path(folder) / reference, self.folder / self.reference(row))
        self._note(row, pixels)

    def _note(self, row: int, pixels: np.ndarray) -> None:
        self.digests[row] = hashlib.sha256(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes()).digest()

    def close(self) -> str:
        """Finish writing. Returns the sha256 of the pixels of all pictures, in order."""
        if self.size:
            self.array.flush()
        return hashlib.sha256(b"".join(self.digests)).hexdigest()


@dataclass(frozen=True)
class Samples:
    """The samples of a split, or a part of them.

    Attributes:
        folder: the prepared folder.
        records: dicts as in the JSON lines.
    """

    folder: Path
    records: tuple[dict, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index]

    def image(self, index: int) -> np.ndarray:
        """Pixels of one sample's picture, uint8 [H, W, 3], read-only."""
        return read_picture(self.folder, self.records[index]["image"])

    def take(self, indices: Iterable[int]) -> "Samples":
        """The samples at `indices`, in that order."""
        return Samples(self.folder, tuple(self.records[int(index)] for index in indices))


def load(folder: str | Path, split: str) -> Samples:
    """A split of a prepared folder.

    Raises:
        FileNotFoundError: the folder is not prepared, or has no such split.
        ValueError: the trigger of a poisoned folder failed.
    """
    folder = opened(folder)
    manifest = read_json(folder / "manifest.json")
    if failed := manifest.get("failed"):
        raise ValueError(f"its trigger failed: {failed}")
    complete(folder, ["images.npy" if manifest["storage"] == "packed" else "images"])
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.jsonl")))
        raise FileNotFoundError(f"{folder} has no split {split!r}: it has {known}")
    return Samples(folder, tuple(read_records(path)))


def write_folder(folder: str | Path, splits: Mapping[str, Sequence[dict]], fill: Callable[[Pictures], None], manifest: dict, *,
                 size: tuple[int, int] | None, extra: Callable[[], Mapping[str, dict]] = dict) -> dict:
    """Write a folder of records and pictures: complete, with its manifest last, or not readable as a dataset.

    Args:
        folder: where.
        splits: records per split; in the place of `image` and `split` each has `row`, the number of its picture.
        fill: puts every picture.
        manifest: what the manifest, which is returned, says besides counts, storage and digest.
        size: height and width of every picture, or None where they differ.
        extra: further JSON files by name; asked for after the pictures are written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = len({record["row"] for records in splits.values() for record in records})
    with scratch(folder, ".writing-") as temporary:
        pictures = Pictures(temporary, count, size)
        fill(pictures)
        sha = hashlib.sha256(pictures.close().encode())
        for split, records in splits.items():
            whole = [without(record, "row") | {"image": pictures.reference(record["row"]), "split": split}
                     for record in records]
            (temporary / f"{split}.jsonl").write_text(lines(whole), encoding="utf-8")
            sha.update((temporary / f"{split}.jsonl").read_bytes())
        for file, content in extra().items():
            write_json(temporary / file, content)
        manifest = manifest | {
            "counts": {split: len(records) for split, records in splits.items()},
            "pictures": count,
            "storage": "packed" if size else "png",
            "content_sha256": sha.hexdigest(),
        }
        shutil.rmtree(begin(folder) / "images", ignore_errors=True)
        for old in (folder / "images.npy", *folder.glob("*.jsonl")):
            old.unlink(missing_ok=True)
        return finish(folder, manifest, temporary)


def without(record: dict, *keys: str) -> dict:
    """A record less some of its entries."""
    return {key: value for key, value in record.items() if key not in keys}


def about(folder: str | Path) -> tuple[dict, dict]:
    """What `write_folder` must know to write a changed copy of a prepared folder: `manifest` and `size`; and its manifest."""
    manifest = read_json(Path(folder) / "manifest.json")
    packed = manifest["storage"] == "packed"
    size = np.load(Path(folder) / "images.npy", mmap_mode="r", allow_pickle=False).shape[1:3] if packed else None
    kept = {key: manifest[key] for key in ("name", "task", "metric", "licence", "notes", "excerpt")}
    return {"manifest": kept, "size": size}, manifest


def copy_test(source: str | Path, folder: str | Path, fill: Callable[[Pictures, list[str]], None],
              extra: Callable[[], Mapping[str, dict]] = dict) -> None:
    """Write the test split of a prepared folder with other pictures. Samples that share a picture share its copy.

    Args:
        fill: puts, as number k, what becomes of the picture `names[k]` of `source`, of the same size.
        extra: see `write_folder`.
    """
    samples = load(source, "test")
    row_of = {image: row for row, image in enumerate(dict.fromkeys(record["image"] for record in samples.records))}
    records = [without(record, "image", "split") | {"row": row_of[record["image"]]} for record in samples.records]
    write_folder(folder, {"test": records}, lambda pictures: fill(pictures, list(row_of)), extra=extra, **about(source)[0])
