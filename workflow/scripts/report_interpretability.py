"""Tables, figures and claims of a paper on robust training by interpretation."""

from pathlib import Path

import pandas as pd

from cupel.job import logged
from cupel.reporting.interpretability_papers import report_paper

with logged(snakemake.log[0]):
    report_paper(snakemake.wildcards.paper, snakemake.params.scale, pd.read_parquet(snakemake.input.cells),
                 snakemake.params.labels, snakemake.params.facts, snakemake.params.claims, snakemake.params.title,
                 Path(snakemake.output.claims).parent)
