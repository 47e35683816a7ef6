"""Ask a victim about purified test pictures."""

from pathlib import Path

from cupel.devices import pick_device
from cupel.multimodal.purification import purify_pictures
from cupel.stages import logged

with logged(snakemake.log[0]):
    folders = {name: Path(snakemake.input[name]).parent for name in ("data", "triggered")}
    purify_pictures(snakemake.params.spec, snakemake.params.defence, snakemake.input.victim, snakemake.input.before,
                    folders["data"], folders["triggered"], dict(snakemake.output.items()),
                    pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
