"""Compute what a trigger is made of."""

from cupel.images import stages
from cupel.job import running

with running(snakemake.log[0], snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb,
             snakemake.params.plugins) as device:
    stages.prepare_trigger(snakemake.params.spec, snakemake.params.data, snakemake.input.get("model") or None,
                           snakemake.output.trigger, device)
