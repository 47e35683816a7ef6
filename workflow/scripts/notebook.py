"""Execute a paper's notebook and keep it as HTML, with the reproducibility card."""

import os

import papermill
from nbconvert import HTMLExporter

from cupel.files import atomic, write_text
from cupel.grid import read_yaml
from cupel.job import logged
from cupel.reporting.card import card_markdown

# the kernel belongs to this job alone: no settings of the user's own notebooks
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"

with logged(snakemake.log[0]):
    card = read_yaml(snakemake.input.card)
    write_text(snakemake.output.card, card_markdown(card, f"Reproducibility card: {card['paper']}"))
    folder = os.path.dirname(snakemake.output.card)
    with atomic(snakemake.output.notebook) as path:
        papermill.execute_notebook(str(snakemake.input.notebook), str(path), progress_bar=False, kernel_name="python3",
                                   parameters={"cells": str(snakemake.input.cells), "folder": folder,
                                               "scale": snakemake.params.scale,
                                               "inside": list(map(str, snakemake.input.inside))})
    exporter = HTMLExporter(exclude_input=True, embed_images=True)
    write_text(snakemake.output.html, exporter.from_filename(snakemake.output.notebook)[0])
