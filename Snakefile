"""Five papers on removing backdoors and on robustness, in one DAG.

    snakemake --cores all                 the whole report of what config.yaml asks for
    snakemake --cores all crow            one paper, also one that config.yaml does not name
    snakemake --cores all PATH            one cell, e.g. results/demo/images/victims/cifar10/.../metrics.json
    snakemake --list-target-rules         everything else that can be asked for by name

The chain: data -> poison -> victim -> purify -> cells (one tidy table) -> tables, figures, claims -> index.html
"""

import os

from snakemake.utils import min_version

min_version("9.0")


# config/config.yaml: in a folder that snakedeploy made
configfile: "config.yaml" if os.path.exists("config.yaml") else "config/config.yaml"


# used with --software-deployment-method apptainer only; built from envs/cupel.def
container: "envs/cupel.sif"


# what Snakemake's own report begins with: snakemake --report report.zip
report: "workflow/captions/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/images.smk"
include: "workflow/rules/robust.smk"
include: "workflow/rules/text.smk"
include: "workflow/rules/vision_language.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/claims.smk"
include: "workflow/rules/cross.smk"
include: "workflow/rules/zoo.smk"
include: "workflow/rules/crate.smk"
include: "workflow/rules/own.smk"
include: "workflow/rules/terminal.smk"


# rules of a paper's own
for paper in GRID.experiments:
    if GRID.file(paper, "rules.smk").is_file():

        include: str(GRID.file(paper, "rules.smk"))


onstart:
    gc.freeze()
    gc.enable()
    before_the_first_job()
    announce()


onsuccess:
    print_found()


onerror:
    print_found()


rule all:
    """The whole report of what config.yaml asks for."""
    default_target: True
    input:
        f"{RESULTS}/index.html",
        comparison(),
    localrule: True


rule data:
    """Download and prepare all data, and nothing else."""
    input:
        list(used_manifests().values()),
    localrule: True


for paper in GRID.papers:

    rule:
        name:
            paper
        input:
            f"{RESULTS}/papers/{paper}/report.html",
            f"{RESULTS}/index.html",  # with the pages that the paper's own leads to
            comparison(),

    workflow.get_rule(paper).docstring = f"Tables, figures, claims and notebook of: {GRID.experiments[paper]['title']}"


check_targets()
