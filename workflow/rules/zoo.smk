# One victim of every attack beside its clean twin, and the gallery of triggers: `snakemake zoo`

ZOO_FOLDER = f"{RESULTS}/zoo"


rule zoo:
    input:
        f"{ZOO_FOLDER}/index.html",


rule zoo_sheet:
    input:
        lambda wildcards: dataset_files(wildcards),
        triggers=lambda wildcards: [f"{folder}/trigger.npz" for folder in trigger_folders(wildcards.dataset, ZOO).values()],
    output:
        f"{ZOO_FOLDER}/triggers_{{dataset}}.png",
    log:
        log_of(ZOO_FOLDER, "triggers_{dataset}"),
    benchmark:
        benchmark_of(ZOO_FOLDER, "triggers_{dataset}")
    params:
        attacks=lambda wildcards: sheet_attacks(wildcards.dataset, ZOO),
        data=data_folder,
        plugins=config["plugins"],
        code=lambda wildcards: sheet_code(sheet_attacks(wildcards.dataset, ZOO)),
    script:
        "../scripts/contact_sheet.py"


def formulas(wildcards):
    names = ("badnets", "blended", "sig", "lc", "bpp")
    return {name: attack_spec(Cell(attack=name, dataset=wildcards.dataset)) for name in names}


rule gallery:
    # the triggers that are formulas, on any data set, by path: results/demo/gallery/gtsrb.png
    input:
        lambda wildcards: dataset_files(wildcards),
    output:
        f"{RESULTS}/gallery/{{dataset}}.png",
    log:
        log_of(RESULTS, "gallery_{dataset}"),
    benchmark:
        benchmark_of(RESULTS, "gallery_{dataset}")
    params:
        attacks=formulas,
        data=data_folder,
        plugins=config["plugins"],
        code=lambda wildcards: sheet_code(formulas(wildcards)),
    script:
        "../scripts/contact_sheet.py"


rule zoo_report:
    input:
        cells=[f"{cell_folder(cell)}/metrics.json" for cell in ZOO.cells("victim")],
        sheets=[f"{ZOO_FOLDER}/triggers_{dataset}.png" for dataset in sorted({cell["dataset"] for cell in ZOO.cells()})],
    output:
        page=f"{ZOO_FOLDER}/index.html",
        table=f"{ZOO_FOLDER}/victims.csv",
        figure=f"{ZOO_FOLDER}/asr_epochs.png",
    log:
        log_of(ZOO_FOLDER, "report"),
    benchmark:
        benchmark_of(ZOO_FOLDER, "report")
    params:
        cells=[{**cell, "folder": cell_folder(cell)} for cell in ZOO.cells("victim")],
        scale=config["scale"],
        root=workflow.basedir,
        code=code("zoo_report.py", also=TEMPLATES),
    script:
        "../scripts/zoo_report.py"
