from pathlib import Path

from cupel.job import running, texts_of
from cupel.text import stages

with running(snakemake) as device:
    files = stages.Files(Path(snakemake.input.base).parent, {**texts_of(snakemake), **snakemake.params.texts},
                         dict(snakemake.output.items()), snakemake.input.victim, snakemake.input.before,
                         snakemake.input.get("reference"))
    stages.purify(snakemake.params.spec, snakemake.params.defence, files, device)
