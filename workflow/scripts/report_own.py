from pathlib import Path

from cupel.job import logged
from cupel.own import grid

with logged(snakemake.log[0]):
    grid.report(Path(snakemake.output.page).parent, snakemake.params.defences)
