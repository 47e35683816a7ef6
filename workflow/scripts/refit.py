from cupel.job import running
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.stages import refit

with running(snakemake) as device:
    refit(snakemake.params.spec, snakemake.params.defence, Inputs.of(snakemake.input), dict(snakemake.output.items()), device)
