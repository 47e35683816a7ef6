"""Fetch, check and write one text data set."""

from pathlib import Path

from cupel.job import logged
from cupel.text.data import sources

with logged(snakemake.log[0]):
    sources.prepare(snakemake.wildcards.dataset, Path(snakemake.output.manifest).parent, kinds=snakemake.params.sources,
                    cache=snakemake.params.cache, mirror=snakemake.params.mirror)
