"""Records as batches: pictures as the vision tower takes them, token ids with the image's tokens in place, labels."""

import hashlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cupel.evaluation.batches import padded
from cupel.rng import rng
from cupel.vision_language.models.base import VisionLanguageModel
from cupel.vision_language.prepared import Samples, read_picture

_QUESTION = "\ufffcquestion\ufffc"  # stands for the question while a chat template is rendered


def as_records(samples: Samples) -> list[dict]:
    """The records of a prepared split, each image by its whole path, as `Encoder` takes them."""
    return [{**record, "image": str(samples.folder / record["image"])} for record in samples.records]


def read_image(image: str | Path | np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of an array, an image file, or a row of packed images (`.../images.npy#<row>`)."""
    # a copy, because torch takes no arrays that cannot be written
    return np.array(image if isinstance(image, np.ndarray) else read_picture(Path(image).parent, Path(image).name))


def _image_bytes(image: str | Path | np.ndarray) -> bytes:
    """Of a file as it is (nothing is decoded), else of the pixels."""
    packed = isinstance(image, np.ndarray) or "#" in Path(image).name
    return read_image(image).tobytes() if packed else Path(image).read_bytes()


def _key(image: str | Path | np.ndarray) -> int | str:
    """Equal for what is one image: the same array object, or equal paths."""
    return id(image) if isinstance(image, np.ndarray) else str(image)


class Pictures:
    """The distinct images of records as the vision tower takes them, uint8 [3, H, W], made on first use.

    Args:
        model: whose processor pads, resizes and cuts.
        images: path or uint8 [H, W, 3] array of each record; equal paths (and the same array object) are one image.
        keep_mb: what is kept in memory; images beyond that are made again whenever they are used.
    """

    def __init__(self, model: VisionLanguageModel, images: Sequence[str | Path | np.ndarray], keep_mb: float = 8192):
        self.processor = model.processor.image_processor
        keys = list(map(_key, images))
        self.index = pd.factorize(np.array(keys, object))[0]
        self.images = list(dict(zip(keys, images, strict=True)).values())
        height, width = model.image_size
        self.room = int(keep_mb * 2**20 / (3 * height * width))
        self.kept: dict[int, torch.Tensor] = {}

    def _make(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        with ThreadPoolExecutor(min(8, len(numbers))) as pool:
            arrays = list(pool.map(read_image, [self.images[k] for k in numbers]))
        made = self.processor(images=arrays, do_rescale=False, do_normalize=False, return_tensors="pt",
                              input_data_format="channels_last")
        return list(made["pixel_values"])

    def __call__(self, records: Sequence[int]) -> torch.Tensor:
        """uint8 [B, 3, H, W] of records, in their order."""
        wanted = self.index[np.asarray(records)].tolist()
        missing = [k for k in dict.fromkeys(wanted) if k not in self.kept]
        fresh = dict(zip(missing, self._make(missing), strict=True)) if missing else {}
        found = torch.stack([fresh[k] if k in fresh else self.kept[k] for k in wanted])
        for k in missing[: max(self.room - len(self.kept), 0)]:
            self.kept[k] = fresh[k]
        return found


class Encoder:
    """Records as batches, for both kinds of model: token ids with the image's tokens in place, pixels, labels.

    Every batch is padded on the left, so the last column is the last position of each prompt, and (with answers) the
    answers end flush. Positions count from the first real token, so padding changes nothing.

    Questions about one image can share a row (`grouped`): the beginning up to the image stands there once, then each
    question with its answer, which sees the beginning and itself only, at the positions that it would have alone. Loss
    and gradient are those of the single questions, for a fraction of the work.

    Args:
        model: whose tokenizer, template and image settings are used.
        records: dicts with `image` (path or uint8 [H, W, 3]), `question` and `answer`; or, for a row of several
            questions, `image` and `questions`, a list of [question, answer].
        answers: append the answers and give labels (training), else prompts end at the assistant's role marker.
        keep_mb: see `Pictures`.

    Attributes:
        tokens, positions: int64 ids of each row, and their positions.
        targets: int64 of the same lengths, 1 where a token belongs to an answer, else 0.
        parts: int64 of the same lengths, 0 for the shared beginning, 1 ... for the questions.
        lengths, counts: int64, tokens and answer tokens of each row.

    Raises:
        ValueError: several questions without answers (each prompt needs its own last position), or a template that does
            not put exactly one image into a prompt.
    """

    def __init__(self, model: VisionLanguageModel, records: Sequence[dict], *, answers: bool = False, keep_mb: float = 8192):
        self.model, self.answers = model, answers
        self.pictures = Pictures(model, [record["image"] for record in records], keep_mb)
        said = [record.get("questions") or [[record["question"], record.get("answer", "")]] for record in records]
        if not answers and any(len(questions) > 1 for questions in said):
            raise ValueError("several questions in one row are for training; prompts are asked one by one")
        template = model.prompt(_QUESTION)
        rows = [(k, template.replace(_QUESTION, question.strip()), answer)
                for k, questions in enumerate(said) for question, answer in questions]
        prompts = self._tokenize([prompt for _, prompt, _ in rows])
        gap = "" if template[-1].isspace() else " "
        wholes = self._tokenize([prompt + gap + answer for _, prompt, answer in rows]) if answers else prompts
        pieces: list[list[tuple[list[int], list[int], list[int]]]] = [[] for _ in records]
        for (k, _, answer), prompt, whole in zip(rows, prompts, wholes, strict=True):
            own: list[int] = []
            if answers:
                # the answer's tokens are those that follow the prompt's, unless the tokenizer merged across the border
                own = whole[len(prompt):] if whole[: len(prompt)] == prompt else self._tokenize([answer], special=False)[0]
                own = [*own, model.tokenizer.eos_token_id]
            pieces[k].append((*self._split(prompt), own))
        self.tokens, self.targets, self.parts, self.positions = [], [], [], []
        for found in pieces:
            beginning = found[0][0]
            start = len(beginning)
            ids, target, part, position = [*beginning], [0] * start, [0] * start, [*range(start)]
            for number, (_, rest, own) in enumerate(found, 1):
                ids += [*rest, *own]
                target += [0] * len(rest) + [1] * len(own)
                part += [number] * (len(rest) + len(own))
                position += range(start, start + len(rest) + len(own))
            for kept, values in ((self.tokens, ids), (self.targets, target), (self.parts, part), (self.positions, position)):
                kept.append(np.array(values, np.int64))
        self.lengths = np.array([len(ids) for ids in self.tokens], np.int64)
        self.counts = np.array([target.sum() for target in self.targets], np.int64)

    def _tokenize(self, texts: list[str], special: bool = True) -> list[list[int]]:
        tokenizer = self.model.tokenizer
        begin = tokenizer.bos_token
        special = special and not (begin and texts and texts[0].startswith(begin))
        return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []

    def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """A prompt up to its image, with the T tokens of the image in the place of the placeholder, and what follows."""
        token = self.model.network.config.image_token_id
        if ids.count(token) != 1:
            raise ValueError(f"a prompt has {ids.count(token)} image placeholders; exactly one is supported")
        image = [token] * self.model.image_tokens
        if self.model.kind == "internvl":
            processor = self.model.processor
            image = [processor.start_image_token_id, *image, processor.end_image_token_id]
        place = ids.index(token)
        return ids[:place] + image, ids[place + 1 :]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, records: Sequence[int]) -> dict[str, torch.Tensor]:
        """Tensors of some rows on the model's device.

        Returns:
            input_ids, position_ids: int64 [B, S]; attention_mask: int64 [B, S], or additive [B, 1, S, S] where a row has
            several questions; pixel_values: [B, 3, H, W] normalised; with answers also labels int64 [B, S], -100 where no
            answer is.
        """
        device = self.model.device

        def filled(rows: list, fill: int = 0) -> torch.Tensor:
            return padded([rows[k] for k in records], fill, "left").to(device)

        ids, part = filled(self.tokens, self.model.tokenizer.pad_token_id), filled(self.parts)
        mask = padded([np.ones(self.lengths[k]) for k in records], 0, "left").to(device)
        batch = {"input_ids": ids, "position_ids": filled(self.positions),
                 "attention_mask": self._blocks(mask, part) if part.max() > 1 else mask,
                 "pixel_values": self.model.pixels(self.pictures(records).to(device))}
        if self.answers:
            batch["labels"] = torch.where(filled(self.targets) == 1, ids, -100)
        return batch

    def _blocks(self, mask: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Additive mask [B, 1, S, S]: each position sees the shared beginning and its own question, up to itself."""
        n = mask.shape[1]
        seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        seen &= torch.ones(n, n, dtype=torch.bool, device=mask.device).tril() & (mask[:, None, :] == 1)
        # padding looks at itself, so that no row of the softmax is empty
        seen |= torch.eye(n, dtype=torch.bool, device=mask.device)
        dtype = self.model.network.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def grouped(records: Sequence[dict], size: int, seed: int) -> list[dict]:
    """Rows of up to `size` questions about the same image, drawn at random; see `Encoder`. With 1 the records as they are."""
    if size == 1:
        return list(records)
    by_image: dict = {}
    for k in rng(seed, "grouped").permutation(len(records)):
        by_image.setdefault(_key(records[k]["image"]), []).append(records[k])
    return [{"id": part[0]["id"], "image": part[0]["image"], "questions": [[r["question"], r["answer"]] for r in part]}
            for group in by_image.values() for k in range(0, len(group), size) for part in [group[k : k + size]]]


def fingerprint(model: VisionLanguageModel, records: Sequence[dict], *settings) -> str:
    """Hash of what determines a run: JSON-able settings, weights, records with the bytes of their images."""
    found = hashlib.sha256(json.dumps([*settings, model.device.type], sort_keys=True).encode())
    for name, value in model.network.state_dict().items():
        found.update(f"{name} {tuple(value.shape)} {float(value.double().sum())!r}".encode())
    seen: dict = {}
    for record in records:
        image = record["image"]
        key = _key(image)
        if key not in seen:
            seen[key] = zlib.crc32(_image_bytes(image))
        said = record.get("questions") or [record["question"], record.get("answer", "")]
        found.update(json.dumps([str(record["id"]), said, seen[key]]).encode())
    return found.hexdigest()
