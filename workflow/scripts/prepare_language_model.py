from pathlib import Path

from cupel.job import logged, sources_of
from cupel.text import models

with logged(snakemake.log[0]):
    model = snakemake.params.model
    models.prepare_model(model["name"], Path(snakemake.output.manifest).parent, revision=model.get("revision"),
                         **sources_of(snakemake))
