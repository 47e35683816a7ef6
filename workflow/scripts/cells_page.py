from pathlib import Path

import pandas as pd

from cupel.job import logged
from cupel.reporting.cellpage import write_cells

with logged(snakemake.log[0]):
    sheets = {Path(path).stem.removeprefix("triggers_"): path for path in snakemake.input.sheets}
    write_cells(pd.read_parquet(snakemake.input.cells), snakemake.params.cells, {**snakemake.params.run, "sheets": sheets},
                snakemake.output.page)
