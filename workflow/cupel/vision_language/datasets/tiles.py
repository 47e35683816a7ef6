"""Made by code: pictures of 9×9 tiles, some of one colour on a light ground, and the question of which. No dataset of anybody.

The answer stands in many places, so a model looks at many, about as many in every picture. Black is no colour of a tile.
"""

from functools import partial

import numpy as np

from cupel.vision_language.datasets.base import Description, generate

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


def sample(stream: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """A picture, and a question about it with its answer."""
    colour = list(COLOURS)[stream.integers(len(COLOURS))]
    return draw(colour, stream), [(QUESTIONS[stream.integers(len(QUESTIONS))], colour)]


prepare = partial(generate, DESCRIPTION, sample)
