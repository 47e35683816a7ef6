"""Write the texts of a language victim: its poisoned training set, the defender's pool, the test prompts."""

from cupel.language import stages
from cupel.stages import logged

with logged(snakemake.log[0]):
    stages.compose(snakemake.params.spec, snakemake.params.data, dict(snakemake.output.items()))
