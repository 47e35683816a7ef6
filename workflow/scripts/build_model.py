"""Build a small vision-language model and pretrain it on clean samples."""

from pathlib import Path

from cupel.multimodal.stages import build
from cupel.stages import logged, pick_device

with logged(snakemake.log[0]):
    build(snakemake.params.spec, Path(snakemake.input.manifest).parent, dict(snakemake.output.items()),
          pick_device(snakemake.params.device, snakemake.resources.get("gpu", 0)), kinds=snakemake.params.sources,
          cache=snakemake.params.cache, mirror=snakemake.params.mirror)
