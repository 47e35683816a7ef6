from pathlib import Path

import pandas as pd

from cupel.job import logged
from cupel.reporting.cellpage import write_cells
from cupel.reporting.tables import misfit

with logged(snakemake.log[0]):
    sheets = {Path(path).stem.removeprefix("triggers_"): path for path in snakemake.input.sheets}
    cells = pd.read_parquet(snakemake.input.cells)
    if wrong := misfit(cells, snakemake.params.cells):
        raise ValueError(wrong)
    write_cells(cells, snakemake.params.cells, {**snakemake.params.run, "sheets": sheets}, snakemake.output.page)
