"""Fetch, check and prepare one dataset."""

from pathlib import Path

from cupel.images import datasets
from cupel.job import logged, sources_of

with logged(snakemake.log[0]):
    datasets.prepare(datasets.describe(snakemake.wildcards.dataset), Path(snakemake.output.manifest).parent,
                     **sources_of(snakemake))
