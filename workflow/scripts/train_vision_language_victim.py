from cupel.job import running
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.stages import train_victim

with running(snakemake) as device:
    train_victim(snakemake.params.spec, Inputs.of(snakemake.input), dict(snakemake.output.items()), device)
