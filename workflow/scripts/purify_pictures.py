"""Ask a victim about purified test pictures."""

from pathlib import Path

from cupel.devices import pick_device
from cupel.job import logged
from cupel.vision_language.purification import purify_pictures

with logged(snakemake.log[0]):
    folders = {name: Path(snakemake.input[name]).parent for name in ("data", "triggered")}
    purify_pictures(snakemake.params.spec, snakemake.params.defence, snakemake.input.victim, snakemake.input.before,
                    folders["data"], folders["triggered"], dict(snakemake.output.items()),
                    pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
