"""Table and picture of the networks that the authors released."""

from pathlib import Path

from cupel.job import logged
from cupel.reporting.paper import load
from cupel.settings import PAPERS

with logged(snakemake.log[0]):
    report = load(PAPERS / "proper_interpretability" / "report.py")
    records = {Path(path).stem: path for path in snakemake.input}
    report.report_released(records, snakemake.params.labels, snakemake.output.table, snakemake.output.figure)
