import pandas as pd

from cupel.job import logged
from cupel.reporting.cross import write_cross

with logged(snakemake.log[0]):
    cells = pd.read_parquet(snakemake.input.cells)
    write_cross(cells[cells.paper.isin(snakemake.params.papers)], snakemake.params.labels, snakemake.params.run,
                snakemake.output)
