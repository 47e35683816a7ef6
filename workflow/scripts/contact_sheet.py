"""Clean and stamped images of every attack on one dataset."""

from cupel.job import logged
from cupel.registry import load_plugins
from cupel.reporting.image_papers import contact_sheet

with logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    # attacks whose trigger is a formula need no file of a victim
    triggers = snakemake.input.get("triggers") or [None] * len(snakemake.params.attacks)
    attacks = {
        name: (spec, trigger)
        for (name, spec), trigger in zip(snakemake.params.attacks.items(), triggers, strict=True)
    }
    contact_sheet(snakemake.wildcards.dataset, snakemake.params.data, attacks, snakemake.output[0])
