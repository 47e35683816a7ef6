"""One evaluation of a trained network."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.robust.measure import Network, attack_network

with logged(snakemake.log[0]):
    network = Network(snakemake.params.data, snakemake.input.model, snakemake.input.before)
    attack_network(snakemake.params.spec, snakemake.params.evaluation, network, dict(snakemake.output.items()),
                   pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
