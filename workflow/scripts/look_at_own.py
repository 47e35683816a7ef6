from pathlib import Path

from cupel.job import running
from cupel.own import grid

with running(snakemake) as device:
    grid.look(snakemake.params.study, Path(snakemake.output.look).parent, device)
