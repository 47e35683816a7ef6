"""What is known of a dataset of pictures with questions or captions, and its way into a prepared folder.

Each module beside this one has the description of the dataset of its name. `cupel.vision_language.prepared` says what a
prepared folder is.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from cupel import archives
from cupel.rng import rng
from cupel.sources import KINDS, Source, fetch
from cupel.vision_language.prepared import Pictures, decode, write_folder

# bye SPEC 4, Table 4 of the paper
OPTION_LETTER = "Answer with the option's letter from the given choices directly"
SHORT_ANSWER = "Answer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."

LETTERS = "ABCDEFGHIJ"
METRICS = {"vqa": "accuracy", "choice": "accuracy", "caption": "cider"}
EXCERPT_TEST_SHARE = 0.2  # of the pictures of an excerpt; a choice made here


@dataclass(frozen=True)
class Description:
    """What is known of a dataset.

    A source's `read` returns the records of the splits `train` and `test` (an excerpt: of `all`), as dicts with `id`,
    `picture` (a key), `question`, and `answer` or, for captions, `answers`; and `pictures`, a function from a list of keys to
    the position in it and the bytes of each image file, in any order.

    Attributes:
        name: of the dataset.
        task: `vqa` (a word or phrase), `choice` (an option's letter) or `caption` (a sentence).
        licence: as stated by the publisher.
        sources: of the whole dataset; see `cupel.sources`.
        excerpts: sources of a known part without splits, for `prepare(..., excerpt=True)`.
        published: number of samples of a whole split, where it is known.
        drawn: how many samples of a split the paper uses, where that is not all of them.
        size: height and width of every picture, where they are equal; such pictures are packed into one array.
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

    def manifest(self, **more) -> dict:
        """What every manifest of this dataset says, and what is given."""
        return {"name": self.name, "task": self.task, "metric": METRICS[self.task], "licence": self.licence,
                "notes": self.notes, "published": dict(self.published), **more}


# ----------------------------------------------------------------------------------------------- files of the publishers


def choice(identity: str, picture: str, problem: Mapping, before: str = "") -> dict:
    """A sample of task `choice`: the question, its options with letters, one a line, and the suffix that asks for a letter.

    Args:
        identity: id of the sample.
        picture: key of its picture.
        problem: `question`, `choices`, and `answer`, the number of the right one.
        before: what stands before the question.

    Raises:
        ValueError: the answer is none of the choices, or there are more than ten.
    """
    question, choices, answer = (problem[key] for key in ("question", "choices", "answer"))
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise ValueError(f"{identity}: answer {answer} among {len(choices)} choices")
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, choices, strict=False))
    return {"id": identity, "picture": picture, "answer": LETTERS[answer],
            "question": f"{before}{question}\n{options}\n{OPTION_LETTER}"}


def from_zip(archive: Path) -> Callable[[Sequence[str]], Iterator[tuple[int, bytes]]]:
    """`pictures` of a source whose keys are the members of an archive."""
    return partial(archives.contents, archive)


def from_files(folder: Path) -> Callable[[Sequence[str]], Iterator[tuple[int, bytes]]]:
    """`pictures` of a source whose keys are paths in a folder."""
    return lambda keys: ((k, (folder / key).read_bytes()) for k, key in enumerate(keys))


def verified_tree(folder: Path, expected: str) -> list[Path]:
    """All files of an excerpt, in the order of their names; `expected` is the sha256 over relative names and contents.

    Raises:
        ValueError: a file is missing, was added or differs.
    """
    sha, files = hashlib.sha256(), sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        content = path.read_bytes()
        sha.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        sha.update(content)
    if sha.hexdigest() != expected:
        raise ValueError(f"{folder}: its files are not those of the known excerpt (sha256 {sha.hexdigest()}, "
                         f"expected {expected})")
    return files


# ---------------------------------------------------------------------------------------------------------------- prepare


def check(description: Description, content: dict, excerpt: bool = False) -> None:
    """Compare what a source gave with what is published of the dataset.

    Raises:
        ValueError: another number of samples, a record without text, or an id that occurs twice.
    """
    def wrong(what: str) -> ValueError:
        return ValueError(f"dataset {description.name}: {what}")

    splits = {key: records for key, records in content.items() if key != "pictures"}
    for split, number in description.published.items():
        if not excerpt and len(splits[split]) != number:
            raise wrong(f"{len(splits[split])} samples in {split}, expected {number}")
    seen = set()
    for split, records in splits.items():
        if not records:
            raise wrong(f"no samples in {split}")
        for record in records:
            texts = [record["question"], *(record["answers"] if description.task == "caption" else [record["answer"]])]
            if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
                raise wrong(f"sample {record['id']} has an empty text")
            if record["id"] in seen:
                raise wrong(f"the id {record['id']} occurs twice")
            seen.add(record["id"])


def split_by_picture(records: Sequence[dict], first: int, seed: int, *stream: str | int) -> tuple[list[dict], list[dict]]:
    """Divide samples so that no picture is on both sides.

    Args:
        records: with a key `picture`.
        first: at least so many samples on the first side: whole pictures are taken, in random order, until they suffice.
        seed, stream: of the order.

    Returns:
        The samples of the first side and of the second, in their order.
    """
    of = Counter(record["picture"] for record in records)
    pictures, chosen, total = list(of), set(), 0
    for k in rng(seed, *stream).permutation(len(pictures)):
        if total >= first:
            break
        chosen.add(pictures[k])
        total += of[pictures[k]]
    return ([record for record in records if record["picture"] in chosen],
            [record for record in records if record["picture"] not in chosen])


def _draw(name: str, split: str, records: list[dict], number: int | None, seed: int) -> list[dict]:
    """`number` of the records, without replacement, in their order; a smaller draw is part of a larger one."""
    if number is None:
        return records
    if not 0 < number <= len(records):
        raise ValueError(f"dataset {name}: {number} samples of {split} are asked for, but there are {len(records)}")
    order = rng(seed, "multimodal", name, split).permutation(len(records))[:number]
    return [records[k] for k in sorted(order)]


def _record(description: Description, split: str, record: dict, seed: int) -> dict:
    """The record of a sample without its picture. A caption to learn is one of the references, drawn per sample."""
    plain = {key: record[key] for key in ("id", "question", "answer", "answers") if key in record}
    if description.task == "caption":
        draw = rng(seed, "multimodal", description.name, "caption", record["id"])
        plain["answer"] = record["answers"][0 if split == "test" else draw.integers(len(record["answers"]))]
    return plain


def prepare(description: Description, folder: str | Path, *, kinds: Sequence[str] = KINDS, cache: str | Path | None = None,
            mirror: str | Path | None = None, seed: int = 0, train: int | None = None, test: int | None = None,
            pretrain: int = 0, excerpt: bool = False, asks: Sequence[str] = ("",), without: Sequence[str] = (),
            pretrain_asks: Sequence[str] = ("",)) -> dict:
    """Fetch a dataset, check it, and write records, pictures and `manifest.json`, which is returned.

    Args:
        kinds, cache, mirror: see `cupel.sources.fetch`.
        seed: of the draws: which samples, which caption, and the split of an excerpt.
        train, test: how many samples to draw uniformly from the split; default as in the paper, or all.
        pretrain: how many samples of the training split to set aside as the split `pretrain`. No picture is in both
            `pretrain` and `train`.
        excerpt: take a known part of the dataset, from the mirror, instead of the whole. Its split is drawn by pictures
            (20 % of the samples, rounded up to whole pictures, for testing); the manifest says so.
        asks: how the questions of `train` and `test` may begin: one kind of question a set, as the paper's sets are.
        without: answers whose samples are left out of `train` and `test`.
        pretrain_asks: how those of `pretrain` may begin.

    Raises:
        NoSource: no source answered with the very dataset.
        ValueError: no source or excerpt of it is known, or more samples are asked for than there are.
    """
    name = description.name
    sources = description.excerpts if excerpt else description.sources
    if not sources:
        raise ValueError(f"dataset {name}: no {'excerpt' if excerpt else 'source of the whole'} of it is known; "
                         f"set excerpt to {str(not excerpt).lower()}")
    source, content = fetch(name, sources, kinds=kinds, cache=cache, mirror=mirror,
                            accept=lambda content: check(description, content, excerpt))
    if excerpt:
        wanted = int(EXCERPT_TEST_SHARE * len(content["all"]))
        content["test"], content["train"] = split_by_picture(content["all"], wanted, seed, "multimodal", name, "excerpt")
    available = {split: len(content[split]) for split in ("train", "test")}
    # the paper's numbers are asked of the whole dataset; an excerpt is taken as a whole
    usual = {} if excerpt else description.drawn
    splits, rest = {}, content["train"]
    if pretrain:
        known = [record for record in rest if record["question"].startswith((*pretrain_asks, *asks))]
        aside, rest = split_by_picture(known, pretrain, seed, "multimodal", name, "pretrain")
        aside = [record for record in aside if record["question"].startswith(tuple(pretrain_asks))]
        splits["pretrain"] = _draw(name, "pretrain", aside, pretrain, seed)
    for split, of, number in (("train", rest, train), ("test", content["test"], test)):
        wanted = [record for record in of if record["question"].startswith(tuple(asks)) and record.get("answer") not in without]
        splits[split] = _draw(name, split, wanted, number or usual.get(split), seed)
    keys = list(dict.fromkeys(record["picture"] for records in splits.values() for record in records))
    rows = {key: row for row, key in enumerate(keys)}

    def fill(pictures: Pictures) -> None:
        for row, encoded in content["pictures"](keys):
            try:
                pictures.put(row, decode(encoded))
            except ValueError as error:
                raise ValueError(f"dataset {name}: picture {keys[row]}: {error}") from None

    records = {split: [_record(description, split, record, seed) | {"row": rows[record["picture"]]} for record in chosen]
               for split, chosen in splits.items()}
    return write_folder(folder, records, fill, description.manifest(
        excerpt=excerpt, seed=seed, available=available, source=source.said()), size=description.size)


# --------------------------------------------------------------------------------------------------------------- generate


def generate(description: Description, sample: Callable[[np.random.Generator], tuple[np.ndarray, Sequence[tuple[str, str]]]],
             folder: str | Path, *, train: int, test: int, pretrain: int = 0, seed: int = 0) -> dict:
    """Write so many samples of each split of a dataset that is made by code, and return the manifest.

    No picture is in two splits.

    Args:
        description: of the dataset.
        sample: draws a picture, and the questions about it with their answers.
        folder, train, test, pretrain, seed: where, how many of each split, and of the draws.
    """
    numbers = {name: number for name, number in (("pretrain", pretrain), ("train", train), ("test", test)) if number}
    stream, records, drawn = rng(seed, description.name), {}, []
    for split, number in numbers.items():
        asked = []
        while len(asked) < number:
            picture, questions = sample(stream)
            asked += [{"question": question, "answer": answer, "row": len(drawn)} for question, answer in questions]
            drawn.append(picture)
        records[split] = [{"id": f"{description.name}-{split}-{k}", **record} for k, record in enumerate(asked[:number])]

    def fill(pictures: Pictures) -> None:
        for row, picture in enumerate(drawn):
            pictures.put(row, picture)

    return write_folder(folder, records, fill, description.manifest(
        excerpt=False, seed=seed, available=numbers, source={"kind": "generated", "files": []}), size=description.size)
