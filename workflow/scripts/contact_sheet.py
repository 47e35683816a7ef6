from cupel.job import logged
from cupel.registry import load_plugins
from cupel.reporting.pictures import contact_sheet

with logged(snakemake.log[0]):
    load_plugins(snakemake.config["plugins"])
    contact_sheet(snakemake.params.folder, snakemake.params.attacks, snakemake.output)
