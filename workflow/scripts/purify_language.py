"""Run one defence on one language victim and measure the result."""

from cupel.job import running
from cupel.text import stages

with running(snakemake.log[0], snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb,
             snakemake.params.plugins) as device:
    files = stages.Files(snakemake.params.base, {**snakemake.params.data, **snakemake.params.texts},
                         dict(snakemake.output.items()), snakemake.input.victim, snakemake.input.before,
                         snakemake.input.get("reference"))
    stages.purify(snakemake.params.spec, snakemake.params.defence, files, device)
