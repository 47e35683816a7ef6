"""Fetch, check and prepare one dataset of pictures with questions or captions."""

from pathlib import Path

from cupel.multimodal.stages import prepare
from cupel.stages import logged

with logged(snakemake.log[0]):
    prepare(snakemake.params.spec, Path(snakemake.output.manifest).parent, snakemake.params.sources, snakemake.params.cache,
            snakemake.params.mirror)
