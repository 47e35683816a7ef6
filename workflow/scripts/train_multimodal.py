"""Fine-tune a vision-language model on a poisoned set and measure it."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.stages import train_victim

with logged(snakemake.log[0]):
    train_victim(snakemake.params.spec, Inputs.of(snakemake.input), dict(snakemake.output.items()),
                 pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
