"""The page of a run on a network of the user."""

from pathlib import Path

import numpy as np
from PIL import Image

from cupel import __version__
from cupel.own import LABELS
from cupel.reporting.page import write_page


def enlarged(image: np.ndarray) -> Image.Image:
    """A picture of at least 128 pixels of a float image [H, W, C] in [0, 1], each pixel a square."""
    pixels = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
    factor = max(1, 128 // len(image))
    return Image.fromarray((pixels * 255).round().astype(np.uint8)).resize((factor * image.shape[1], factor * image.shape[0]),
                                                                         Image.Resampling.NEAREST)


def write_report(out: Path, report, facts: dict) -> Path:
    """Write `index.html` of a `cupel.own.run.Purified` into `out`, with the picture of a reversed trigger where there is one.

    `facts` are what the run was given.
    """
    seen = report.evidence.get("nc", {})
    if "mask" in seen:
        enlarged(seen["mask"] * seen["pattern"]).save(out / "reversed_trigger.png")
    page = out / "index.html"
    write_page(page, "own.html.j2", rows=report.table.to_dict("records"), evidence=report.evidence, facts=facts,
               version=__version__, metrics={key: label for key, label in LABELS.items() if key in report.table})
    return page
