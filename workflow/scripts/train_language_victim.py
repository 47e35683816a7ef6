"""Train a language victim on its poisoned texts and measure it."""

from cupel.job import running
from cupel.text import stages

with running(snakemake.log[0], snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb) as device:
    files = stages.Files(snakemake.params.base, {**snakemake.params.data, **snakemake.params.texts},
                         dict(snakemake.output.items()))
    stages.train_victim(snakemake.params.spec, files, device)
