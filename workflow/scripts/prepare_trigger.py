"""Compute what a trigger is made of."""

from cupel import stages
from cupel.registry import load_plugins

with stages.logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    stages.prepare_trigger(snakemake.params.spec, snakemake.params.data, snakemake.input.get("model") or None,
                           snakemake.output.trigger,
                           stages.pick_device(snakemake.params.device, snakemake.resources.get("gpu", 0)))
