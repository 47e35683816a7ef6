"""Masks, selections, stages and perturbations of one run of IMS."""

from cupel import job
from cupel.devices import pick_device
from cupel.registry import load_plugins
from cupel.reporting.paper import load
from cupel.settings import PAPERS

with job.logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    inside = load(PAPERS / "ims" / "inside.py")
    inside.draw(snakemake.params.run, snakemake.input, snakemake.output,
                pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
