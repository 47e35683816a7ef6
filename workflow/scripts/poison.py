"""Choose and stamp the poisoned samples of a victim."""

from cupel import stages
from cupel.registry import load_plugins

with stages.logged(snakemake.log[0]):
    load_plugins(snakemake.params.plugins)
    stages.poison(snakemake.params.spec, snakemake.params.data, snakemake.input.get("trigger") or None,
                  snakemake.output.record)
