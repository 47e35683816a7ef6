"""One network that the authors released, under the published protocol."""

from pathlib import Path

from cupel.devices import pick_device
from cupel.job import logged
from cupel.robust.measure import attack_released

with logged(snakemake.log[0]):
    spec = snakemake.params.spec
    attack_released(snakemake.input.network, "small", spec["settings"], spec["train_eps"],
                    Path(snakemake.input.manifest).parent, snakemake.output.record,
                    pick_device(snakemake.params.device, snakemake.resources.gpu, snakemake.resources.vram_mb))
