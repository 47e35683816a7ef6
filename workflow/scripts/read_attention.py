from cupel.job import running
from cupel.vision_language.attention import read_attention
from cupel.vision_language.inputs import Inputs

with running(snakemake) as device:
    read_attention(snakemake.params.spec, Inputs.of(snakemake.input), dict(snakemake.output.items()), device)
