"""Made by code: small pictures of one coloured shape and two questions about each. For tests; no dataset of anybody."""

from pathlib import Path

import numpy as np

from cupel.rng import rng
from cupel.vision_language.data import METRICS, Pictures, write_folder

SIDE = 32
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200)}
FORMS = ("square", "disc")


def draw(form: str, colour: str, stream: np.random.Generator) -> np.ndarray:
    """A shape of random size and place on a light ground, uint8 [32, 32, 3]."""
    half = int(stream.integers(6, 10))
    y, x = stream.integers(half, SIDE - half, 2)
    rows, columns = np.indices((SIDE, SIDE)) - np.array([y, x])[:, None, None]
    inside = np.maximum(abs(rows), abs(columns)) < half if form == "square" else np.hypot(rows, columns) < half
    picture = np.full((SIDE, SIDE, 3), int(stream.integers(200, 250)), np.uint8)
    picture[inside] = COLOURS[colour]
    return picture


def prepare(folder: str | Path, *, train: int, test: int, pretrain: int = 0, seed: int = 0) -> dict:
    """Write the splits as a prepared folder (see `cupel.vision_language.data`); no picture is in two splits.

    Args:
        folder: where to write.
        train, test, pretrain: number of samples; two ask about the same picture.
        seed: of the pictures.

    Returns:
        The manifest.
    """
    numbers = {name: number for name, number in (("pretrain", pretrain), ("train", train), ("test", test)) if number}
    stream = rng(seed, "shapes")
    records, drawn, references = {}, [], {}
    for split, number in numbers.items():
        records[split], references[split] = [], []
        for k in range(number):
            if k % 2 == 0:
                form, colour = FORMS[stream.integers(len(FORMS))], list(COLOURS)[stream.integers(len(COLOURS))]
                drawn.append(draw(form, colour, stream))
            question, answer = (("what colour is the shape?", colour), ("which shape is it?", form))[k % 2]
            records[split].append({"id": f"shapes-{split}-{k}", "question": question, "answer": answer})
            references[split].append(len(drawn) - 1)

    def fill(scratch: Path) -> tuple[dict[str, list[str]], str]:
        pictures = Pictures(scratch, len(drawn), (SIDE, SIDE))
        for row, picture in enumerate(drawn):
            pictures.put(row, picture)
        return {split: [pictures.reference(row) for row in rows] for split, rows in references.items()}, pictures.close()

    return write_folder(folder, records, fill, {
        "name": "shapes", "task": "vqa", "metric": METRICS["vqa"], "licence": "made by the pipeline", "notes": "for tests",
        "excerpt": False, "seed": seed, "available": numbers, "published": {}, "source": {"kind": "generated", "files": []}})
