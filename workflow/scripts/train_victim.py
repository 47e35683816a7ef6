"""Train and measure a victim."""

from cupel import job
from cupel.devices import pick_device
from cupel.images import stages
from cupel.registry import load_plugins

with job.logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    inputs = stages.Inputs(snakemake.params.data, snakemake.input.record, snakemake.input.get("trigger") or None)
    stages.train_victim(snakemake.params.spec, inputs, dict(snakemake.output.items()),
                        pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
