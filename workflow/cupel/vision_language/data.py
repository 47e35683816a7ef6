"""Image-text data as every multimodal stage reads it: records in JSON lines, pictures, and a manifest.

A prepared folder holds

    <split>.jsonl   one record a line: id, image, question, answer, split, and for captions answers (all references)
    images.npy      uint8 [M, H, W, 3], memory-mapped, where all pictures have one size; the image of a record is then
                    `images.npy#<row>`
    images/         otherwise: one PNG per picture, the image of a record is `images/<row>.png`
    manifest.json   written last; without it the folder is no dataset

`question` is the whole text of the user's turn (body and suffix, bye SPEC 4) without chat template and image token.
Pictures are kept lossless, as decoded from the source: whatever is painted on some of them later leaves no trace of a
second JPEG compression. All PNGs come from one encoder with one setting.
"""

import difflib
import hashlib
import importlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from cupel.files import write_json
from cupel.rng import rng
from cupel.sources import KINDS, Source, fetch

# bye SPEC 4, Table 4 of the paper
OPTION_LETTER = "Answer with the option's letter from the given choices directly"
SHORT_ANSWER = "Answer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."

METRICS = {"vqa": "accuracy", "choice": "accuracy", "caption": "cider"}
EXCERPT_TEST_SHARE = 0.2  # of the pictures of an excerpt; a choice made here
_MEMBER_LIMIT = 1 << 28  # bytes of one file in an archive
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")

# dataset → module of this package that has its description, and the name there
DATASETS = {
    "easy_vqa": ("easy_vqa", "DESCRIPTION"),
    "scienceqa": ("scienceqa", "DESCRIPTION"),
    "iconqa": ("iconqa", "DESCRIPTION"),
    "flickr30k": ("flickr", "FLICKR30K"),
    "flickr8k": ("flickr", "FLICKR8K"),
    "rsvqa": ("rsvqa", "DESCRIPTION"),
}


@dataclass(frozen=True)
class Description:
    """What is known of a dataset.

    A source's `read` returns `picture`, a function from a key to the bytes of an image file, and the records of the
    splits `train` and `test` (an excerpt: of `all`), as dicts with `id`, `picture` (a key), `question`, and `answer` or,
    for captions, `answers`.

    Attributes:
        name: of the dataset.
        task: `vqa` (a word or phrase), `choice` (an option's letter) or `caption` (a sentence).
        sources: of the whole dataset; see `cupel.sources`.
        excerpts: sources of a known part without splits, for `prepare(..., excerpt=True)`.
        published: number of samples of a whole split, where it is known.
        drawn: how many samples of a split the paper uses, where that is not all of them.
        size: height and width of every picture, where they are equal; such pictures are packed into one array.
        licence: as stated by the publisher.
        notes: what a reader of results should know.
    """

    name: str
    task: str
    licence: str
    sources: tuple[Source, ...] = ()
    excerpts: tuple[Source, ...] = ()
    published: Mapping[str, int] = field(default_factory=dict)
    drawn: Mapping[str, int] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    notes: str = ""


def describe(name: str) -> Description:
    """The description of a dataset.

    Raises:
        ValueError: unknown name; the text lists the known ones.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown multimodal dataset {name!r}: known are {', '.join(DATASETS)}{hint}")
    module, attribute = DATASETS[name]
    return getattr(importlib.import_module(f"cupel.vision_language.{module}"), attribute)


def with_options(question: str, choices: Sequence[str]) -> str:
    """A question, its options with letters, one a line, and the suffix that asks for a letter."""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", choices, strict=False))
    return f"{question}\n{options}\n{OPTION_LETTER}"


# ----------------------------------------------------------------------------------------------- files of the publishers


def zip_members(archive: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """The names of the regular files in a zip, and a function that reads one. Nothing is unpacked to disk."""
    pack = zipfile.ZipFile(archive)

    def read(member: str) -> bytes:
        try:
            size = pack.getinfo(member).file_size
        except KeyError:
            raise ValueError(f"{archive}: no member {member}") from None
        if size > _MEMBER_LIMIT:
            raise ValueError(f"{archive}: member {member} has {size} bytes, more than the {_MEMBER_LIMIT} expected")
        return pack.read(member)

    return [info.filename for info in pack.infolist() if not info.is_dir()], read


def tree_digest(folder: Path, files: Iterable[Path]) -> str:
    """sha256 over the names, relative to `folder`, and contents of files, in the order of their names."""
    sha = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        sha.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        sha.update(content)
    return sha.hexdigest()


def verified_tree(folder: Path, files: Iterable[Path], expected: str) -> None:
    """Compare the files of an excerpt with those that it is known to have.

    Raises:
        ValueError: a file is missing, was added or differs.
    """
    found = tree_digest(folder, files)
    if found != expected:
        raise ValueError(f"{folder}: its files are not those of the known excerpt (sha256 {found}, expected {expected})")


# --------------------------------------------------------------------------------------------------------------- pictures


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
        there, here = Path(folder) / reference, self.folder / self.reference(row)
        try:
            os.link(there, here)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(there, here)
        self._note(row, pixels)

    def _note(self, row: int, pixels: np.ndarray) -> None:
        self.digests[row] = hashlib.sha256(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes()).digest()

    def close(self) -> str:
        """Finish writing. Returns the sha256 of the pixels of all pictures, in order."""
        if self.size:
            self.array.flush()
        return hashlib.sha256(b"".join(self.digests)).hexdigest()


@lru_cache(maxsize=16)
def _mapped(path: str, modified: int) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def read_picture(folder: str | Path, reference: str) -> np.ndarray:
    """The picture of a record, uint8 [H, W, 3], read-only.

    Raises:
        ValueError: the reference leads out of the folder.
    """
    file, _, row = reference.partition("#")
    path = Path(folder) / file
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"image {reference!r} lies outside {folder}")
    return _mapped(str(path), path.stat().st_mtime_ns)[int(row)] if row else decode(path.read_bytes())


# ---------------------------------------------------------------------------------------------------------------- samples


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


def write_folder(folder: str | Path, splits: Mapping[str, Sequence[dict]],
                 fill: Callable[[Path], tuple[Mapping[str, Sequence[str]], str]], manifest: dict,
                 extra: Callable[[], Mapping[str, dict]] = dict) -> dict:
    """Write a folder of records and pictures: complete, with its manifest last, or not readable as a dataset.

    Args:
        folder: where.
        splits: records per split, without `image` and `split`.
        fill: writes the pictures into a folder; returns, per split, the reference for each record, and their digest.
        manifest: what the manifest says besides counts, storage and digest.
        extra: further JSON files by name; asked for after the pictures are written.

    Returns:
        The manifest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as name:
        scratch = Path(name)
        references, pixels = fill(scratch)
        sha = hashlib.sha256(pixels.encode())
        for split, records in splits.items():
            lines = "".join(
                json.dumps(record | {"image": image, "split": split}, ensure_ascii=False, sort_keys=True) + "\n"
                for record, image in zip(records, references[split], strict=True))
            (scratch / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            sha.update(lines.encode())
        for file, content in extra().items():
            write_json(scratch / file, content)
        (folder / "manifest.json").unlink(missing_ok=True)  # from here to its return the folder is no dataset
        for old in ("images.npy", "images", *(path.name for path in folder.glob("*.jsonl"))):
            if (folder / old).is_dir():
                shutil.rmtree(folder / old)
            else:
                (folder / old).unlink(missing_ok=True)
        for path in scratch.iterdir():
            os.replace(path, folder / path.name)
    packed = (folder / "images.npy").exists()
    manifest = manifest | {
        "counts": {split: len(records) for split, records in splits.items()},
        "pictures": len({image for images in references.values() for image in images}),
        "storage": "packed" if packed else "png",
        "content_sha256": sha.hexdigest(),
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def load(folder: str | Path, split: str) -> Samples:
    """A split of a prepared folder.

    Raises:
        FileNotFoundError: the folder is not prepared, or has no such split.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} is no prepared dataset; "
                                f"make it with: snakemake --cores 1 {folder}/manifest.json")
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.jsonl")))
        raise FileNotFoundError(f"{folder} has no split {split!r}: it has {known}")
    with open(path, encoding="utf-8") as file:
        return Samples(folder, tuple(json.loads(line) for line in file))


# ---------------------------------------------------------------------------------------------------------------- prepare


def check(description: Description, content: dict, excerpt: bool = False) -> None:
    """Compare what a source gave with what is published of the dataset.

    Raises:
        ValueError: another number of samples, a record without text, or an id that occurs twice.
    """
    splits = {key: records for key, records in content.items() if key != "picture"}
    for split, number in description.published.items():
        if not excerpt and len(splits[split]) != number:
            raise ValueError(f"dataset {description.name}: {len(splits[split])} samples in {split}, expected {number}")
    seen = set()
    for split, records in splits.items():
        if not records:
            raise ValueError(f"dataset {description.name}: no samples in {split}")
        for record in records:
            texts = [record["question"], *(record["answers"] if description.task == "caption" else [record["answer"]])]
            if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"dataset {description.name}: sample {record['id']} has an empty text")
            if record["id"] in seen:
                raise ValueError(f"dataset {description.name}: the id {record['id']} occurs twice")
            seen.add(record["id"])


def split_by_picture(records: Sequence[dict], first: int, seed: int, *stream: str | int) -> tuple[list[int], list[int]]:
    """Divide samples so that no picture is on both sides.

    Args:
        records: with a key `picture`.
        first: at least so many samples on the first side: whole pictures are taken, in random order, until they suffice.
        seed, stream: of the order.

    Returns:
        Ascending indices of the first side and of the second.
    """
    pictures = list(dict.fromkeys(record["picture"] for record in records))
    held = dict.fromkeys(pictures, 0)
    for record in records:
        held[record["picture"]] += 1
    chosen, total = set(), 0
    for k in rng(seed, *stream).permutation(len(pictures)):
        if total >= first:
            break
        chosen.add(pictures[k])
        total += held[pictures[k]]
    sides = [record["picture"] in chosen for record in records]
    return [k for k, side in enumerate(sides) if side], [k for k, side in enumerate(sides) if not side]


def _draw(description: Description, split: str, records: list[dict], number: int | None, seed: int) -> list[dict]:
    """`number` of the records, without replacement, in their order; a smaller draw is part of a larger one."""
    if number is None:
        return records
    if not 0 < number <= len(records):
        raise ValueError(f"dataset {description.name}: {number} samples of {split} are asked for, but there are "
                         f"{len(records)}")
    order = rng(seed, "multimodal", description.name, split).permutation(len(records))[:number]
    return [records[k] for k in sorted(order)]


def _splits(description: Description, content: dict, seed: int, train: int | None, test: int | None, pretrain: int,
            excerpt: bool) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """The samples of each split to write, and how many the source has."""
    name = description.name
    if excerpt:
        records = content["all"]
        share = int(EXCERPT_TEST_SHARE * len(records))
        test_side, train_side = split_by_picture(records, share, seed, "multimodal", name, "excerpt")
        content = {"train": [records[k] for k in train_side], "test": [records[k] for k in test_side]}
    available = {split: len(content[split]) for split in ("train", "test")}
    # the paper's numbers are asked of the whole dataset; an excerpt is taken as a whole
    wanted = {} if excerpt else description.drawn
    numbers = {"train": train or wanted.get("train"), "test": test or wanted.get("test")}
    splits = {}
    rest = content["train"]
    if pretrain:
        first, second = split_by_picture(rest, pretrain, seed, "multimodal", name, "pretrain")
        splits["pretrain"] = _draw(description, "pretrain", [rest[k] for k in first], pretrain, seed)
        rest = [rest[k] for k in second]
    splits["train"] = _draw(description, "train", rest, numbers["train"], seed)
    splits["test"] = _draw(description, "test", content["test"], numbers["test"], seed)
    return splits, available


def _record(description: Description, split: str, record: dict, seed: int) -> dict:
    """The record of a sample without its picture. A caption to learn is one of the references, drawn per sample."""
    plain = {key: record[key] for key in ("id", "question", "answer", "answers") if key in record}
    if description.task == "caption":
        draw = rng(seed, "multimodal", description.name, "caption", record["id"])
        plain["answer"] = record["answers"][0 if split == "test" else draw.integers(len(record["answers"]))]
    return plain


def prepare(name: str, folder: str | Path, *, kinds: Sequence[str] = KINDS, cache: str | Path | None = None,
            mirror: str | Path | None = None, seed: int = 0, train: int | None = None, test: int | None = None,
            pretrain: int = 0, excerpt: bool = False) -> dict:
    """Fetch a dataset, check it, and write records, pictures and `manifest.json`.

    Args:
        name: a key of `DATASETS`.
        folder: where to write.
        kinds, cache, mirror: see `cupel.sources.fetch`.
        seed: of the draws: which samples, which caption, and the split of an excerpt.
        train, test: how many samples to draw uniformly from the split; default as in the paper, or all.
        pretrain: how many samples of the training split to set aside as the split `pretrain`. No picture is in both
            `pretrain` and `train`.
        excerpt: take a known part of the dataset, from the mirror, instead of the whole. Its split is drawn by pictures
            (20 % of the samples, rounded up to whole pictures, for testing); the manifest says so.

    Returns:
        The manifest.

    Raises:
        NoSource: no source answered with the very dataset.
        ValueError: unknown dataset, no source or excerpt of it is known, or more samples are asked for than there are.
    """
    description = describe(name)
    sources = description.excerpts if excerpt else description.sources
    if not sources:
        raise ValueError(f"dataset {name}: no {'excerpt' if excerpt else 'source of the whole'} of it is known; "
                         f"set excerpt to {str(not excerpt).lower()}")
    source, content = fetch(name, sources, kinds=kinds, cache=cache, mirror=mirror,
                            accept=lambda content: check(description, content, excerpt))
    splits, available = _splits(description, content, seed, train, test, pretrain, excerpt)
    rows = {key: row for row, key in enumerate(dict.fromkeys(
        record["picture"] for records in splits.values() for record in records))}

    def fill(scratch: Path) -> tuple[dict[str, list[str]], str]:
        pictures = Pictures(scratch, len(rows), description.size)
        for key, row in rows.items():
            try:
                pictures.put(row, decode(content["picture"](key)))
            except ValueError as error:
                raise ValueError(f"dataset {name}: picture {key}: {error}") from None
        return {split: [pictures.reference(rows[record["picture"]]) for record in records]
                for split, records in splits.items()}, pictures.close()

    records = {split: [_record(description, split, record, seed) for record in chosen] for split, chosen in splits.items()}
    return write_folder(folder, records, fill, {
        "name": name,
        "task": description.task,
        "metric": METRICS[description.task],
        "licence": description.licence,
        "notes": description.notes,
        "excerpt": excerpt,
        "seed": seed,
        "available": available,
        "published": dict(description.published),
        "source": {"kind": source.kind,
                   "files": [{"name": raw.name, "checksum": raw.checksum, "origin": str(raw.origin or "mirror")}
                             for raw in source.files]},
    })
