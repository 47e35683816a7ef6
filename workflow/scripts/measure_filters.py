"""What every filter removes from a poisoned training set, and how well that is the poison."""

from pathlib import Path

from cupel.job import logged
from cupel.vision_language.detection import measure_filters

with logged(snakemake.log[0]):
    flags = dict(zip(snakemake.params.asked["filters"], snakemake.output.flags, strict=True))
    outputs = {**dict(snakemake.output.items()), "flags": flags}
    measure_filters(snakemake.params.spec, snakemake.params.asked["filters"], snakemake.params.asked["taus"],
                    snakemake.input.entropies, snakemake.input.attention, Path(snakemake.input.poisoned).parent, outputs)
