"""Build a small vision-language model and pretrain it on clean samples."""

from pathlib import Path

from cupel.devices import pick_device
from cupel.job import logged
from cupel.vision_language.stages import build

with logged(snakemake.log[0]):
    build(snakemake.params.spec, Path(snakemake.input.manifest).parent, dict(snakemake.output.items()),
          pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb),
          kinds=snakemake.params.sources, cache=snakemake.params.cache, mirror=snakemake.params.mirror)
