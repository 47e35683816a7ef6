from pathlib import Path

from cupel.job import running, texts_of
from cupel.text import stages

with running(snakemake) as device:
    files = stages.Files(Path(snakemake.input.base).parent, {**texts_of(snakemake), **snakemake.params.texts},
                         dict(snakemake.output.items()))
    stages.train_victim(snakemake.params.spec, files, device)
