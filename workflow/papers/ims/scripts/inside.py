"""Masks, selections, stages and perturbations of one run of IMS."""

from cupel.job import running
from cupel.reporting.paper import load
from cupel.settings import PAPERS

with running(snakemake) as device:
    inside = load(PAPERS / "ims" / "inside.py")
    inside.draw(snakemake.params.run, snakemake.input, snakemake.output, device)
