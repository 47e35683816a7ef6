from cupel import job
from cupel.images import stages
from cupel.registry import load_plugins

with job.logged(snakemake.log[0]):
    load_plugins(snakemake.config["plugins"])
    stages.poison(snakemake.params.spec, job.data_of(snakemake, "images"), snakemake.input.get("trigger") or None,
                  snakemake.output.record)
