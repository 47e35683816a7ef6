"""Fetch, check and prepare one dataset."""

from pathlib import Path

from cupel.images import datasets
from cupel.job import logged

with logged(snakemake.log[0]):
    datasets.prepare(datasets.describe(snakemake.wildcards.dataset), Path(snakemake.output.manifest).parent,
                     kinds=snakemake.params.sources, cache=snakemake.params.cache, mirror=snakemake.params.mirror)
