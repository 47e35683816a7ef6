"""Train a network with an objective of robust training."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.robust.stages import train_network

with logged(snakemake.log[0]):
    train_network(snakemake.params.spec, snakemake.params.data, dict(snakemake.output.items()),
                  pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
