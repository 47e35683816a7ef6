"""One network that the authors released, under the published protocol."""

from pathlib import Path

from cupel.job import running
from cupel.robust.measure import attack_released

with running(snakemake) as device:
    attack_released(snakemake.params.spec, snakemake.input.network, Path(snakemake.input.manifest).parent,
                    snakemake.output.record, device)
