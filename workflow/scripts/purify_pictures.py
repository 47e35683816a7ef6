from cupel.job import running
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.purification import purify_pictures

with running(snakemake) as device:
    purify_pictures(snakemake.params.spec, snakemake.params.defence, Inputs.of(snakemake.input),
                    dict(snakemake.output.items()), device)
