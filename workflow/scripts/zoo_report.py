"""The zoo: a table of one victim per attack beside its clean twin, and the gallery."""

import os
from pathlib import Path

from cupel.files import write_text
from cupel.reporting.page import write_page
from cupel.reporting.provenance import git_commit, processor
from cupel.reporting.tables import gather, victims_beside_twins
from cupel.stages import logged, versions

with logged(snakemake.log[0]):
    page = Path(snakemake.output.page)
    table = victims_beside_twins(gather(snakemake.params.cells))
    write_text(snakemake.output.table, table.to_csv(index=False))
    made = {"commit": git_commit(snakemake.params.root), "processor": processor(), "versions": versions()}
    sheets = [os.path.relpath(path, page.parent) for path in snakemake.input.sheets]
    write_page(page, "zoo.html.j2", scale=snakemake.params.scale, rows=table.to_dict("records"), sheets=sheets, made=made)
