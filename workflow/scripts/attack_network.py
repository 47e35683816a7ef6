"""One evaluation of a trained network."""

from cupel.job import running
from cupel.robust.measure import Network, attack_network

with running(snakemake.log[0], snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb) as device:
    network = Network(snakemake.params.data, snakemake.input.model, snakemake.input.before)
    attack_network(snakemake.params.spec, snakemake.params.evaluation, network, dict(snakemake.output.items()), device)
