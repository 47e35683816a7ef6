"""Attention entropies of a victim's training set, and maps of some test pictures."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.vision_language.attention import read_attention
from cupel.vision_language.inputs import Inputs

with logged(snakemake.log[0]):
    read_attention(snakemake.params.spec, Inputs.of(snakemake.input), dict(snakemake.output.items()),
                   pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
