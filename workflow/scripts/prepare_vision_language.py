from pathlib import Path

from cupel.job import logged, sources_of
from cupel.vision_language.stages import prepare

with logged(snakemake.log[0]):
    prepare(snakemake.params.spec, Path(snakemake.output.manifest).parent, **sources_of(snakemake))
