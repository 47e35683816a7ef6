"""Train a language victim on its poisoned texts and measure it."""

from cupel.language import stages
from cupel.stages import logged, pick_device

with logged(snakemake.log[0]):
    stages.train_victim(snakemake.params.spec, snakemake.params.base, {**snakemake.params.data, **snakemake.params.texts},
                        dict(snakemake.output.items()),
                        pick_device(snakemake.params.device, snakemake.resources.get("gpu", 0)))
