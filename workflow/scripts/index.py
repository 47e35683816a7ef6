import pandas as pd

from cupel.job import logged
from cupel.reporting.index import write_index

with logged(snakemake.log[0]):
    cross = snakemake.input.cross
    write_index(snakemake.params.papers, pd.read_parquet(snakemake.input.cells),
                {**snakemake.params.run, "sheets": snakemake.input.sheets, "cross": cross and cross[0]}, snakemake.output)
