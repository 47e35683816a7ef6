import pandas as pd

from cupel.job import logged
from cupel.reporting.paperpage import write_paper_page

with logged(snakemake.log[0]):
    cells = pd.read_parquet(snakemake.input.cells)
    write_paper_page(snakemake.params.header, cells[cells.paper == snakemake.wildcards.paper], snakemake.params.run,
                     snakemake.output.page)
