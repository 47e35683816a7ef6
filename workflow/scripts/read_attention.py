"""Attention entropies of a victim's training set, and maps of some test pictures."""

from pathlib import Path

from cupel.devices import pick_device
from cupel.job import logged
from cupel.vision_language.attention import read_attention

with logged(snakemake.log[0]):
    folders = {name: Path(snakemake.input[name]).parent for name in ("poisoned", "data", "triggered")}
    read_attention(snakemake.params.spec, snakemake.input.victim, snakemake.input.before, folders["poisoned"], folders["data"],
                   folders["triggered"], dict(snakemake.output.items()),
                   pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
