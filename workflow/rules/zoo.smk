# One victim of every attack beside its clean twin, and the gallery of triggers

ZOO_FOLDER = f"{RESULTS}/zoo"


rule zoo:
    """One victim of every attack beside its clean twin, and their gallery."""
    input:
        f"{ZOO_FOLDER}/index.html",


rule zoo_report:
    """Victims of every attack beside their clean twins, as a page."""
    input:
        cells=[f"{PATHS.cell(cell)}/metrics.json" for cell in ZOO.cells("victim")],
        sheets=[f"{ZOO_FOLDER}/triggers_{dataset}.png" for dataset in sorted({cell["dataset"] for cell in ZOO.cells()})],
    output:
        page=f"{ZOO_FOLDER}/index.html",
        table=f"{ZOO_FOLDER}/victims.csv",
        figure=f"{ZOO_FOLDER}/asr_epochs.svg",
    log:
        PATHS.log(ZOO_FOLDER, "report"),
    benchmark:
        PATHS.benchmark(ZOO_FOLDER, "report")
    localrule: True
    params:
        cells=[{**cell, "folder": here(PATHS.cell(cell))} for cell in ZOO.cells("victim")],
        scale=config["scale"],
        root=ROOT,
        code=code_digest(SCRIPTS / "zoo_report.py", *TEMPLATES),
    script:
        "../scripts/zoo_report.py"
