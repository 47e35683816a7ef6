"""Five papers on removing backdoors and on robustness, in one DAG.

    snakemake --cores all                 the whole report at the scale in config.yaml
    snakemake --cores all data            download and prepare the data
    snakemake --cores all fst             tables, figures and claims of one paper
    snakemake --cores all zoo             one victim of every attack beside its clean twin, and their gallery
    snakemake --cores all released_weights  the networks that the authors of proper_interpretability released, measured
    snakemake --cores all crate           the run as an RO-Crate: code, settings, results, checksums
    snakemake --cores all bundle          all that a machine without network needs, see docs/offline.md
    snakemake --cores all PATH            one cell, e.g. results/demo/victims/cifar10/.../metrics.json

The chain: data -> poison -> victim -> purify -> cells (one tidy table) -> tables, figures, claims -> index.html
"""

from snakemake.utils import min_version

min_version("9.0")


configfile: "config.yaml"


# used with --software-deployment-method apptainer only; built from envs/cupel.def
container: "envs/cupel.sif"


# what Snakemake's own report begins with: snakemake --report report.zip
report: "workflow/captions/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/image.smk"
include: "workflow/rules/interpretability_common.smk"
include: "workflow/rules/interpretability.smk"
include: "workflow/rules/language.smk"
include: "workflow/rules/multimodal.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/claims.smk"
include: "workflow/rules/cross.smk"
include: "workflow/rules/zoo.smk"
include: "workflow/rules/bundle.smk"
include: "workflow/rules/crate.smk"


# rules of a paper's own
for paper in GRID.known:
    if GRID.file(paper, "rules.smk").is_file():

        include: str(GRID.file(paper, "rules.smk"))


# on a cluster these run where Snakemake runs: they take seconds, or need the network that nodes often lack
localrules:
    prepare_dataset,
    prepare_text,
    prepare_language_model,
    compose_texts,
    prepare_multimodal,
    download_wheels,
    make_bundle,
    make_crate,


onstart:
    hold_lock()


rule all:
    default_target: True
    input:
        f"{RESULTS}/index.html",


rule data:
    input:
        list(used_manifests().values()),


for paper in GRID.papers:

    rule:
        name:
            paper
        input:
            f"{RESULTS}/papers/{paper}/report.html",
