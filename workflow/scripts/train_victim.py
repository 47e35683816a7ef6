"""Train and measure a victim."""

from cupel.images import stages
from cupel.job import running

with running(snakemake.log[0], snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb,
             snakemake.params.plugins) as device:
    inputs = stages.Inputs(snakemake.params.data, snakemake.input.record, snakemake.input.get("trigger") or None)
    stages.train_victim(snakemake.params.spec, inputs, dict(snakemake.output.items()), device)
