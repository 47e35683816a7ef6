"""The page of a run on a network of the user."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cupel import __version__
from cupel.files import write_text
from cupel.own import LABELS
from cupel.reporting.page import write_page


def enlarged(image: np.ndarray) -> Image.Image:
    """A picture of at least 128 pixels of a float image [H, W, C] in [0, 1], each pixel a square."""
    pixels = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
    factor = max(1, 128 // len(image))
    return Image.fromarray((pixels * 255).round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1))


def metrics_of(table: pd.DataFrame) -> dict[str, str]:
    """What a table has measured: column to name for people."""
    return {key: label for key, label in LABELS.items() if key in table}


def write_report(out: Path, table: pd.DataFrame, evidence: dict, reversed_trigger: dict, facts: dict) -> Path:
    """Write `results.csv`, `index.html` and the picture of a reversed trigger, where there is one, into `out`.

    Args:
        table, evidence, reversed_trigger: see `cupel.own.run.Purified`.
        facts: of `cupel.own.run.Study.facts`, and `settings` by defence.
    """
    write_text(out / "results.csv", table.to_csv(index=False))
    if reversed_trigger:
        enlarged(reversed_trigger["mask"] * reversed_trigger["pattern"]).save(out / "reversed_trigger.png")
    page, facts = out / "index.html", {**facts, "settings": {name: given for name, given in facts["settings"].items() if given}}
    write_page(page, "own.html.j2", rows=table.to_dict("records"), evidence=evidence, facts=facts, version=__version__,
               metrics=metrics_of(table))
    return page
