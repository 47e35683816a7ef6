"""Fine-tune a vision-language model on a poisoned set and measure it."""

from pathlib import Path

from cupel.devices import pick_device
from cupel.multimodal.stages import train_victim
from cupel.stages import logged

with logged(snakemake.log[0]):
    folders = {name: Path(snakemake.input[name]).parent for name in ("poisoned", "data", "triggered")}
    train_victim(snakemake.params.spec, snakemake.input.get("base") or None, folders["poisoned"], folders["data"],
                 folders["triggered"], dict(snakemake.output.items()),
                 pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
