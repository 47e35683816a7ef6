"""Compute what a trigger is made of."""

from cupel import job
from cupel.devices import pick_device
from cupel.images import stages
from cupel.registry import load_plugins

with job.logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    stages.prepare_trigger(snakemake.params.spec, snakemake.params.data, snakemake.input.get("model") or None,
                           snakemake.output.trigger,
                           pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
