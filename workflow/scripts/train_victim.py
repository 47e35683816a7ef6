from cupel.images import stages
from cupel.job import data_of, running

with running(snakemake) as device:
    inputs = stages.Inputs(data_of(snakemake, "images"), snakemake.input.record, snakemake.input.get("trigger") or None)
    stages.train_victim(snakemake.params.spec, inputs, dict(snakemake.output.items()), device)
