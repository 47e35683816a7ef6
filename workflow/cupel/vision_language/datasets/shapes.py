"""Made by code: small pictures of one coloured shape and two questions about each. For tests; no dataset of anybody."""

from pathlib import Path

import numpy as np

from cupel.rng import rng
from cupel.vision_language.datasets.base import Description
from cupel.vision_language.prepared import Pictures, write_folder

SIDE = 32
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200)}
FORMS = ("square", "disc")
DESCRIPTION = Description(name="shapes", task="vqa", licence="made by the pipeline", notes="for tests", size=(SIDE, SIDE))


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
    """Write so many samples of each split, two about each picture, as a prepared folder, and return its manifest.

    No picture is in two splits.
    """
    numbers = {name: number for name, number in (("pretrain", pretrain), ("train", train), ("test", test)) if number}
    stream = rng(seed, "shapes")
    records, drawn = {}, []
    for split, number in numbers.items():
        records[split] = []
        for k in range(number):
            if k % 2 == 0:
                form, colour = FORMS[stream.integers(len(FORMS))], list(COLOURS)[stream.integers(len(COLOURS))]
                drawn.append(draw(form, colour, stream))
            question, answer = (("what colour is the shape?", colour), ("which shape is it?", form))[k % 2]
            records[split].append({"id": f"shapes-{split}-{k}", "question": question, "answer": answer,
                                   "row": len(drawn) - 1})

    def fill(pictures: Pictures) -> None:
        for row, picture in enumerate(drawn):
            pictures.put(row, picture)

    return write_folder(folder, records, fill, DESCRIPTION.manifest(
        excerpt=False, seed=seed, available=numbers, source={"kind": "generated", "files": []}), size=DESCRIPTION.size)
