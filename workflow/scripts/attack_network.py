from cupel.job import data_of, running
from cupel.robust.measure import Network, attack_network

with running(snakemake) as device:
    network = Network(data_of(snakemake, "images"), snakemake.input.model, snakemake.input.before)
    attack_network(snakemake.params.spec, snakemake.params.evaluation, network, dict(snakemake.output.items()), device)
