from cupel.job import logged
from cupel.reporting.zoo import write_zoo

with logged(snakemake.log[0]):
    write_zoo(snakemake.params.cells, snakemake.input.sheets, snakemake.output, scale=snakemake.params.scale,
              root=snakemake.params.root)
