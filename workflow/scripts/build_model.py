from pathlib import Path

from cupel.job import running, sources_of
from cupel.vision_language.stages import build

with running(snakemake) as device:
    build(snakemake.params.spec, Path(snakemake.input.manifest).parent, dict(snakemake.output.items()), device,
          **sources_of(snakemake))
