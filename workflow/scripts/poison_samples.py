from pathlib import Path

from cupel.job import logged
from cupel.registry import load_plugins
from cupel.vision_language.stages import poison

with logged(snakemake.log[0]):
    load_plugins(snakemake.config["plugins"])
    poison(snakemake.params.spec, Path(snakemake.input.manifest).parent, Path(snakemake.output.manifest).parent)
