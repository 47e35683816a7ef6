from cupel.images import stages
from cupel.job import data_of, running

with running(snakemake) as device:
    stages.prepare_trigger(snakemake.params.spec, data_of(snakemake, "images"), snakemake.input.get("model") or None,
                           snakemake.output.trigger, device)
