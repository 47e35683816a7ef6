"""Run all defences of a block on one victim, each in a process of its own, and measure the results."""

from cupel import stages
from cupel.devices import pick_device
from cupel.registry import load_plugins

load_plugins(snakemake.params.plugins)
device = pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb)
for k, defence in enumerate(snakemake.params.defences):
    outputs = {name: snakemake.output[name][k] for name in ("model", "history", "metrics")}
    stages.separately(stages.purify, snakemake.params.spec, defence, snakemake.params.data, snakemake.input.victim,
                      snakemake.input.trigger, snakemake.input.before, outputs, device, log=snakemake.log[k])
