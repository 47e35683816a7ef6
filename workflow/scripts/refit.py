"""Fine-tune again on what a filter left, and measure the result."""

from pathlib import Path

from cupel.devices import pick_device
from cupel.job import logged
from cupel.vision_language.stages import refit

with logged(snakemake.log[0]):
    folders = {name: Path(snakemake.input[name]).parent for name in ("poisoned", "data", "triggered")}
    refit(snakemake.params.spec, snakemake.params.defence, snakemake.input.get("base") or None, snakemake.input.victim,
          snakemake.input.before, snakemake.input.flags, folders["poisoned"], folders["data"], folders["triggered"],
          dict(snakemake.output.items()),
          pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
