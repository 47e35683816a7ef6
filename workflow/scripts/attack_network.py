"""One evaluation of a trained network."""

from cupel.interpretability.measure import attack_network
from cupel.stages import logged, pick_device

with logged(snakemake.log[0]):
    attack_network(snakemake.params.spec, snakemake.params.evaluation, snakemake.params.data, snakemake.input.model,
                   snakemake.input.before, dict(snakemake.output.items()),
                   pick_device(snakemake.params.device, snakemake.resources.get("gpu", 0)))
