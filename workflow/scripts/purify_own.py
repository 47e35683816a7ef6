from pathlib import Path

from cupel.job import running
from cupel.own import grid

with running(snakemake) as device:
    defence = snakemake.wildcards.defence, snakemake.params.settings
    grid.purify(snakemake.params.study, defence, Path(snakemake.output.row).parents[1], device)
