"""Tables, figures and claims of one paper."""

from pathlib import Path

import pandas as pd

from cupel.job import logged
from cupel.reporting.image_papers import report_paper

with logged(snakemake.log[0]):
    reported = pd.concat([pd.read_csv(path) for path in snakemake.input.reported], ignore_index=True)
    report_paper(snakemake.wildcards.paper, snakemake.params.scale, pd.read_parquet(snakemake.input.cells),
                 snakemake.params.labels, snakemake.params.kinds, snakemake.params.reach, snakemake.params.claims, reported,
                 snakemake.params.title, Path(snakemake.output.claims).parent)
