from cupel.files import atomic
from cupel.job import logged
from cupel.reporting.tables import gather

with logged(snakemake.log[0]), atomic(snakemake.output.cells) as path:
    gather(snakemake.params.cells, snakemake.params.gates).to_parquet(path, index=False)
