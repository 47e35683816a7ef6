"""Ask a victim about purified test pictures."""

from pathlib import Path

from cupel.multimodal.purification import purify_pictures
from cupel.stages import logged, pick_device

with logged(snakemake.log[0]):
    folders = {name: Path(snakemake.input[name]).parent for name in ("data", "triggered")}
    purify_pictures(snakemake.params.spec, snakemake.params.defence, snakemake.input.victim, snakemake.input.before,
                    folders["data"], folders["triggered"], dict(snakemake.output.items()),
                    pick_device(snakemake.params.device, snakemake.resources.get("gpu", 0)))
