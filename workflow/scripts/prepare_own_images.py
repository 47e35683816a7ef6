"""Prepare an image data set that a plugin describes."""

from pathlib import Path

from cupel.images import datasets
from cupel.job import logged
from cupel.registry import load_plugins

with logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    datasets.prepare(datasets.describe(snakemake.wildcards.dataset), Path(snakemake.output.manifest).parent,
                     kinds=snakemake.params.sources, cache=snakemake.params.cache, mirror=snakemake.params.mirror)
