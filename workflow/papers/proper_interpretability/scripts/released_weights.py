"""Table and picture of the networks that the authors released, and the claims judged on them."""

from pathlib import Path

from cupel.job import logged
from cupel.reporting.paper import load
from cupel.settings import PAPERS, read_yaml

with logged(snakemake.log[0]):
    report = load(PAPERS / "proper_interpretability" / "report.py")
    records = {Path(path).stem: path for path in snakemake.input.records}
    report.report_released(records, snakemake.params.labels, snakemake.output.table, snakemake.output.figure)
    report.judge_released(read_yaml(snakemake.input.claims), records, snakemake.output.verdicts, snakemake.params.scale,
                          snakemake.input.trained)
