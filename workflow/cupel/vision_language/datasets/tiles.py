"""Made by code: pictures of 9×9 tiles, some of one colour on a light ground, and the question of which. No dataset of anybody.

The answer stands in many places, so a model looks at many, about as many in every picture. Black is no colour of a tile.
"""

from pathlib import Path

import numpy as np

from cupel.rng import rng
from cupel.vision_language.datasets.base import Description
from cupel.vision_language.prepared import Pictures, write_folder

CELLS, CELL, COLOURED = 9, 8, 24
SIDE = CELLS * CELL
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 50), "blue": (50, 60, 210), "yellow": (225, 205, 60),
           "teal": (40, 175, 175), "brown": (140, 85, 45), "pink": (235, 130, 180), "orange": (240, 140, 40)}
QUESTIONS = ("what color are the tiles?", "what is the color of the tiles?", "which color do the tiles have?")
DESCRIPTION = Description(name="tiles", task="vqa", licence="made by the pipeline", notes="for attention without objects",
                          size=(SIDE, SIDE))


def draw(colour: str, stream: np.random.Generator) -> np.ndarray:
    """24 of 81 tiles of a colour, at random places and of slightly different brightness, with noise: uint8 [72, 72, 3]."""
    tiles = np.full((CELLS * CELLS, 3), stream.uniform(200, 250))
    chosen = stream.permutation(CELLS * CELLS)[:COLOURED]
    tiles[chosen] = np.array(COLOURS[colour]) * stream.uniform(0.85, 1.1, (COLOURED, 1))
    picture = np.kron(tiles.reshape(CELLS, CELLS, 3), np.ones((CELL, CELL, 1))) + stream.normal(0, 8, (SIDE, SIDE, 1))
    return picture.clip(0, 255).astype(np.uint8)


def prepare(folder: str | Path, *, train: int, test: int, pretrain: int = 0, seed: int = 0) -> dict:
    """Write so many samples of each split, each with a picture of its own, as a prepared folder, and return its manifest."""
    numbers = {name: number for name, number in (("pretrain", pretrain), ("train", train), ("test", test)) if number}
    stream, records, drawn = rng(seed, "tiles"), {}, []
    for split, number in numbers.items():
        records[split] = []
        for k in range(number):
            colour = list(COLOURS)[stream.integers(len(COLOURS))]
            drawn.append(draw(colour, stream))
            records[split].append({"id": f"tiles-{split}-{k}", "question": QUESTIONS[stream.integers(len(QUESTIONS))],
                                   "answer": colour, "row": len(drawn) - 1})

    def fill(pictures: Pictures) -> None:
        for row, picture in enumerate(drawn):
            pictures.put(row, picture)

    return write_folder(folder, records, fill, DESCRIPTION.manifest(
        excerpt=False, seed=seed, available=numbers, source={"kind": "generated", "files": []}), size=DESCRIPTION.size)
