"""One evaluation of a trained network."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.robust.measure import attack_network

with logged(snakemake.log[0]):
    attack_network(snakemake.params.spec, snakemake.params.evaluation, snakemake.params.data, snakemake.input.model,
                   snakemake.input.before, dict(snakemake.output.items()),
                   pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
