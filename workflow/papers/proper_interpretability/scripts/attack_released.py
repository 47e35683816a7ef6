"""One network that the authors released, under the published protocol."""

from pathlib import Path

from cupel.devices import pick_device
from cupel.job import logged
from cupel.robust.measure import attack_released

with logged(snakemake.log[0]):
    attack_released(snakemake.params.spec, snakemake.input.network, Path(snakemake.input.manifest).parent,
                    snakemake.output.record,
                    pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
