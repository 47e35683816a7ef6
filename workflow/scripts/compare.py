from pathlib import Path

from cupel.job import logged
from cupel.reporting.compare import write_comparison
from cupel.reporting.page import navigation

with logged(snakemake.log[0]):
    write_comparison(snakemake.params.folders, Path(snakemake.output.page).parent, navigation(snakemake.params.run))
