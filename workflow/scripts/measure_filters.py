from cupel.job import logged
from cupel.registry import load_plugins
from cupel.vision_language.detection import measure_filters
from cupel.vision_language.inputs import Inputs

with logged(snakemake.log[0]):
    load_plugins(snakemake.config["plugins"])
    flags = dict(zip(snakemake.params.asked["filters"], snakemake.output.flags, strict=True))
    measure_filters(snakemake.params.spec, snakemake.params.asked, Inputs.of(snakemake.input),
                    {**dict(snakemake.output.items()), "flags": flags})
