from pathlib import Path

import pandas as pd

from cupel.job import logged
from cupel.reporting.paper import Paper, read_reported, write_report
from cupel.reporting.planning import report_file

with logged(snakemake.log[0]):
    asked, key = snakemake.params, snakemake.wildcards.paper
    cells = pd.read_parquet(snakemake.input.cells)
    paper = Paper(key=key, title=asked.title, scale=asked.scale, cells=cells[cells.paper == key], labels=asked.labels,
                  facts=asked.facts, reported=read_reported(snakemake.input.reported),
                  files={kind: list(files) for kind, files in snakemake.input.items() if kind not in ("cells", "reported")},
                  out=Path(snakemake.output.tables).parent, registry=asked.registry)
    write_report(paper, report_file(asked.report))
