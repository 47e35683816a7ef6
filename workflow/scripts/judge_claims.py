import pandas as pd

from cupel.evaluation.claims import judge_all
from cupel.files import write_text
from cupel.job import logged
from cupel.settings import read_yaml

with logged(snakemake.log[0]):
    claims = read_yaml(snakemake.input.claims) if snakemake.input.claims else {"claims": []}
    cells = pd.read_parquet(snakemake.input.cells)
    verdicts = judge_all(claims, cells, snakemake.wildcards.paper, snakemake.params.scale)
    write_text(snakemake.output[0], verdicts.to_csv(index=False))
