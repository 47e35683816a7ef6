"""Measure a network of the user as it was given, and look at it without the trigger."""

from pathlib import Path

from cupel.job import running
from cupel.own import grid

with running(snakemake) as device:
    grid.look(snakemake.params.study, Path(snakemake.output.look).parent, device)
