"""Fine-tune again on what a filter left, and measure the result."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.stages import refit

with logged(snakemake.log[0]):
    refit(snakemake.params.spec, snakemake.params.defence, Inputs.of(snakemake.input), dict(snakemake.output.items()),
          pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
