"""Run one defence on one victim and measure the result."""

from cupel import stages
from cupel.devices import pick_device
from cupel.registry import load_plugins

with stages.logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    stages.purify(snakemake.params.spec, snakemake.params.defence, snakemake.params.data, snakemake.input.victim,
                  snakemake.input.trigger, snakemake.input.before, dict(snakemake.output.items()),
                  pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
