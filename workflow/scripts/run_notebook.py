import os
import sys

from cupel.job import logged
from cupel.reporting.notebook import run_notebook, write_card

with logged(snakemake.log[0]):
    os.dup2(sys.stderr.fileno(), 2)  # the kernel is a process of its own, and says that it listens on the loopback interface
    write_card(snakemake.input.card, snakemake.output.card)
    run_notebook(snakemake.input.notebook, {"cells": snakemake.input.cells, **snakemake.params.parameters},
                 snakemake.output.notebook)
