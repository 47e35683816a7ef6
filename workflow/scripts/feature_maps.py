from cupel.job import logged
from cupel.registry import load_plugins
from cupel.reporting.pictures import feature_maps

with logged(snakemake.log[0]):
    load_plugins(snakemake.config["plugins"])
    feature_maps(snakemake.params.spec, snakemake.params.folder, snakemake.output)
