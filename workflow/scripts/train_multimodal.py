"""Fine-tune a vision-language model on a poisoned set and measure it."""

from pathlib import Path

from cupel.devices import pick_device
from cupel.job import logged
from cupel.vision_language.stages import train_victim

with logged(snakemake.log[0]):
    folders = {name: Path(snakemake.input[name]).parent for name in ("poisoned", "data", "triggered")}
    train_victim(snakemake.params.spec, snakemake.input.get("base") or None, folders["poisoned"], folders["data"],
                 folders["triggered"], dict(snakemake.output.items()),
                 pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
