"""Masks, selections, stages and perturbations of one run of IMS."""

from cupel import job
from cupel.devices import pick_device
from cupel.registry import load_plugins
from cupel.reporting.ims_inside import look_inside

with job.logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    look_inside(snakemake.params.spec, snakemake.params.defence, snakemake.params.data, snakemake.input.victim,
                snakemake.input.trigger, dict(snakemake.output.items()),
                pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
