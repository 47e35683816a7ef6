from pathlib import Path

from cupel.job import logged, sources_of
from cupel.text.data import sources

with logged(snakemake.log[0]):
    sources.prepare(snakemake.wildcards.dataset, Path(snakemake.output.manifest).parent, **sources_of(snakemake))
