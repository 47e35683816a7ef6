"""Table and picture of the networks that the authors released."""

from pathlib import Path

from cupel.job import logged
from cupel.reporting.interpretability_papers import report_released

with logged(snakemake.log[0]):
    records = {Path(path).stem: path for path in snakemake.input}
    report_released(records, snakemake.params.labels, snakemake.output.table, snakemake.output.figure)
