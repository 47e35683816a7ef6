"""Run one defence on one language victim and measure the result."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.registry import load_plugins
from cupel.text import stages

with logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    files = stages.Files(snakemake.params.base, {**snakemake.params.data, **snakemake.params.texts},
                         dict(snakemake.output.items()), snakemake.input.victim, snakemake.input.before,
                         snakemake.input.get("reference"))
    stages.purify(snakemake.params.spec, snakemake.params.defence, files,
                  pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
