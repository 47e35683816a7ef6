from pathlib import Path

from cupel.images import stages
from cupel.job import data_of, running

with running(snakemake) as device:
    jobs = [stages.Job(defence, code, {"model": model, "history": Path(model).with_name("history.csv"), "metrics": metrics,
                                       "details": Path(model).with_name("details.npz")})
            for defence, code, model, metrics in zip(snakemake.params.defences, snakemake.params.code, snakemake.output.model,
                                                     snakemake.output.metrics, strict=True)]
    inputs = stages.Inputs(data_of(snakemake, "images"), trigger=snakemake.input.trigger, victim=snakemake.input.victim,
                           before=snakemake.input.before)
    stages.purify_block(snakemake.params.spec, jobs, inputs, device)
