"""Build a small vision-language model and pretrain it on clean samples."""

from pathlib import Path

from cupel.job import running
from cupel.vision_language.stages import build

with running(snakemake.log[0], snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb) as device:
    build(snakemake.params.spec, Path(snakemake.input.manifest).parent, dict(snakemake.output.items()), device,
          kinds=snakemake.params.sources, cache=snakemake.params.cache, mirror=snakemake.params.mirror)
