"""Made by code: small pictures of one coloured shape and two questions about each. For tests; no dataset of anybody."""

from functools import partial

import numpy as np

from cupel.vision_language.datasets.base import Description, generate

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


def sample(stream: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """A picture, and two questions about it with their answers."""
    form, colour = FORMS[stream.integers(len(FORMS))], list(COLOURS)[stream.integers(len(COLOURS))]
    return draw(form, colour, stream), [("what colour is the shape?", colour), ("which shape is it?", form)]


prepare = partial(generate, DESCRIPTION, sample)
