"""Ask a victim about purified test pictures."""

from cupel.job import running
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.purification import purify_pictures

with running(snakemake.log[0], snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb,
             snakemake.params.plugins) as device:
    purify_pictures(snakemake.params.spec, snakemake.params.defence, Inputs.of(snakemake.input),
                    dict(snakemake.output.items()), device)
