"""Run one defence on one language victim and measure the result."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.text import purification

with logged(snakemake.log[0]):
    purification.purify(snakemake.params.spec, snakemake.params.defence, snakemake.params.base, snakemake.input.victim,
                        snakemake.input.before, {**snakemake.params.data, **snakemake.params.texts},
                        snakemake.input.get("reference"), dict(snakemake.output.items()),
                        pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
