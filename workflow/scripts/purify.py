"""Run defences on one victim, each in a process of its own, and measure the results."""

from pathlib import Path

from cupel import job
from cupel.devices import pick_device
from cupel.images import stages
from cupel.registry import load_plugins

with job.logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    outputs = [{"model": model, "history": Path(model).with_name("history.csv"), "metrics": metrics,
                "details": Path(model).with_name("details.npz")}
               for model, metrics in zip(snakemake.output.model, snakemake.output.metrics, strict=True)]
    stages.purify_block(snakemake.params.spec, snakemake.params.defences, snakemake.params.code, snakemake.params.data,
                        snakemake.input.victim, snakemake.input.trigger, snakemake.input.before, outputs,
                        pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
