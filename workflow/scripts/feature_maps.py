"""Feature maps of victims and purified models of one paper."""

from cupel.job import logged
from cupel.registry import load_plugins
from cupel.reporting.image_papers import feature_maps

with logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    feature_maps(snakemake.params.panels, snakemake.params.data, snakemake.params.dataset, snakemake.params.target,
                 snakemake.params.test_size, dict(snakemake.output.items()))
