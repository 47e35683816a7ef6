"""A paper's notebook, executed, with its reproducibility card."""

from cupel.job import logged
from cupel.reporting.notebook import run_notebook, write_card

with logged(snakemake.log[0]):
    write_card(snakemake.input.card, snakemake.output.card)
    run_notebook(snakemake.input.notebook, {"cells": snakemake.input.cells, **snakemake.params.parameters},
                 snakemake.output.notebook)
