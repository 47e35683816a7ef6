"""Train a language victim on its poisoned texts and measure it."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.text import stages

with logged(snakemake.log[0]):
    files = stages.Files(snakemake.params.base, {**snakemake.params.data, **snakemake.params.texts},
                         dict(snakemake.output.items()))
    stages.train_victim(snakemake.params.spec, files,
                        pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
