"""Train a network with an objective of robust training."""

from cupel.job import running
from cupel.robust.stages import train_network

with running(snakemake.log[0], snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb) as device:
    train_network(snakemake.params.spec, snakemake.params.data, dict(snakemake.output.items()), device)
