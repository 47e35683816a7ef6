from cupel.job import logged, texts_of
from cupel.registry import load_plugins
from cupel.text import stages

with logged(snakemake.log[0]):
    load_plugins(snakemake.config["plugins"])
    stages.compose(snakemake.params.spec, texts_of(snakemake), dict(snakemake.output.items()))
