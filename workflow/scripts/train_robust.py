from cupel.job import data_of, running
from cupel.robust.stages import train_network

with running(snakemake) as device:
    train_network(snakemake.params.spec, data_of(snakemake, "images"), dict(snakemake.output.items()), device)
