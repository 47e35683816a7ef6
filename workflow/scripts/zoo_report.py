"""The zoo: a table of one victim per attack beside its clean twin, and the gallery."""

import os
from pathlib import Path

from cupel.files import read_json, write_text
from cupel.job import logged
from cupel.reporting import figures
from cupel.reporting.page import write_page
from cupel.reporting.provenance import git_commit, processor, versions
from cupel.reporting.tables import gather, victims_beside_twins

with logged(snakemake.log[0]):
    page = Path(snakemake.output.page)
    table = victims_beside_twins(gather(snakemake.params.cells))
    write_text(snakemake.output.table, table.to_csv(index=False))
    length = {cell["folder"]: read_json(Path(cell["folder"]) / "metrics.json").get("epochs") for cell in snakemake.params.cells}
    figures.save(
        figures.asr_against_epochs(table.assign(epochs=table.path.map(length)).query("status == 'ok'")), snakemake.output.figure
    )
    made = {"commit": git_commit(snakemake.params.root), "processor": processor(), "versions": versions()}
    sheets = [os.path.relpath(path, page.parent) for path in snakemake.input.sheets]
    write_page(page, "zoo.html.j2", scale=snakemake.params.scale, rows=table.to_dict("records"), sheets=sheets, made=made)
