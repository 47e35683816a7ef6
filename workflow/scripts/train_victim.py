"""Train and measure a victim."""

from cupel import stages
from cupel.registry import load_plugins

with stages.logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    stages.train_victim(snakemake.params.spec, snakemake.params.data, snakemake.input.record,
                        snakemake.input.get("trigger") or None, dict(snakemake.output.items()),
                        stages.pick_device(snakemake.params.device, snakemake.resources.get("gpu", 0)))
