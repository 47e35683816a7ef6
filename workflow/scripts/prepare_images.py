from pathlib import Path

from cupel.images import datasets
from cupel.job import logged, sources_of
from cupel.registry import load_plugins

with logged(snakemake.log[0]):
    load_plugins(snakemake.config["plugins"])
    datasets.prepare(datasets.describe(snakemake.wildcards.dataset), Path(snakemake.output.manifest).parent,
                     **sources_of(snakemake))
