"""Train a network with an objective of robust training."""

from cupel.interpretability.stages import train_network
from cupel.stages import logged, pick_device

with logged(snakemake.log[0]):
    train_network(snakemake.params.spec, snakemake.params.data, dict(snakemake.output.items()),
                  pick_device(snakemake.params.device, snakemake.resources.get("gpu", 0)))
