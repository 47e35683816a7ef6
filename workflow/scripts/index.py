"""The first page: claims, tables, figures, failed cells, provenance."""

import pandas as pd

from cupel.job import logged
from cupel.reporting.index import write_index

with logged(snakemake.log[0]):
    write_index(snakemake.params.papers, pd.read_parquet(snakemake.input.cells),
                {**snakemake.params.run, "sheets": snakemake.input.sheets, "cross": bool(snakemake.input.cross)},
                snakemake.output)
