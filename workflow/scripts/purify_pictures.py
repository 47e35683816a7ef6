"""Ask a victim about purified test pictures."""

from cupel.devices import pick_device
from cupel.job import logged
from cupel.registry import load_plugins
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.purification import purify_pictures

with logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    purify_pictures(snakemake.params.spec, snakemake.params.defence, Inputs.of(snakemake.input),
                    dict(snakemake.output.items()),
                    pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
