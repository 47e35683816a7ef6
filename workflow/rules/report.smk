# cells -> one tidy table -> tables, figures, claims and a notebook per paper -> index.html

PAPER = f"{RESULTS}/papers/{{paper}}"


rule gather_cells:
    input:
        all_cell_files(),
    output:
        cells=f"{RESULTS}/cells.parquet",
    log:
        log_of(RESULTS, "gather_cells"),
    benchmark:
        benchmark_of(RESULTS, "gather_cells")
    params:
        cells=expected_cells(),
        code=code("gather_cells.py"),
    script:
        "../scripts/gather_cells.py"


rule report_paper:
    input:
        cells=f"{RESULTS}/cells.parquet",
        histories=history_files,
        reported=lambda wildcards: sorted(str(path) for path in GRID.file(wildcards.paper, "reported").glob("*.csv")),
    output:
        claims=report(f"{PAPER}/claims.csv", caption="../captions/claims.rst", category="{paper}", labels={"what": "claims"}),
        tables=report(
            directory(f"{PAPER}/tables"),
            patterns=["{name}.csv"],
            caption="../captions/table.rst",
            category="{paper}",
            subcategory="tables",
            labels={"what": "{name}"},
        ),
        figures=report(
            directory(f"{PAPER}/figures"),
            patterns=["{name}.png"],
            caption="../captions/figure.rst",
            category="{paper}",
            subcategory="figures",
            labels={"what": "{name}"},
        ),
    log:
        log_of(PAPER, "report_paper"),
    benchmark:
        benchmark_of(PAPER, "report_paper")
    wildcard_constraints:
        paper=only(GRID.papers_of("image")),
    params:
        scale=config["scale"],
        labels=lambda wildcards: labels_of(wildcards.paper),
        kinds=lambda wildcards: kinds_of(wildcards.paper),
        reach=lambda wildcards: reach_of(wildcards.paper),
        claims=lambda wildcards: claims_of(wildcards.paper),
        title=lambda wildcards: GRID.experiments[wildcards.paper]["title"],
        code=code("report_paper.py"),
    script:
        "../scripts/report_paper.py"


rule feature_maps:
    input:
        lambda wildcards: feature_inputs(wildcards.paper),
    output:
        figure=report(
            f"{PAPER}/features.png", caption="../captions/features.rst", category="{paper}", labels={"what": "features"}
        ),
        table=f"{PAPER}/features.csv",
    log:
        log_of(PAPER, "feature_maps"),
    benchmark:
        benchmark_of(PAPER, "feature_maps")
    resources:
        mem_mb=memory_of(4000),
    params:
        panels=lambda wildcards: feature_panels(wildcards.paper),
        data=data_folder,
        dataset=lambda wildcards: feature_setting(wildcards.paper)["dataset"],
        target=lambda wildcards: feature_setting(wildcards.paper)["target"],
        test_size=lambda wildcards: feature_setting(wildcards.paper)["test_size"],
        plugins=config["plugins"],
        code=lambda wildcards: feature_code(wildcards.paper),
    script:
        "../scripts/feature_maps.py"


rule contact_sheet:
    input:
        lambda wildcards: dataset_files(wildcards),
        triggers=lambda wildcards: [f"{folder}/trigger.npz" for folder in trigger_folders(wildcards.dataset).values()],
    output:
        report(
            f"{RESULTS}/figures/triggers_{{dataset}}.png",
            caption="../captions/triggers.rst",
            category="triggers",
            labels={"what": "{dataset}"},
        ),
    log:
        log_of(RESULTS, "triggers_{dataset}"),
    benchmark:
        benchmark_of(RESULTS, "triggers_{dataset}")
    params:
        attacks=lambda wildcards: sheet_attacks(wildcards.dataset),
        data=data_folder,
        plugins=config["plugins"],
        code=lambda wildcards: sheet_code(sheet_attacks(wildcards.dataset)),
    script:
        "../scripts/contact_sheet.py"


rule notebook:
    input:
        notebook=lambda wildcards: GRID.file(wildcards.paper, "report.ipynb"),
        card=lambda wildcards: GRID.file(wildcards.paper, "card.yaml"),
        cells=f"{RESULTS}/cells.parquet",
        claims=f"{PAPER}/claims.csv",
        tables=f"{PAPER}/tables",
        figures=f"{PAPER}/figures",
        pictures=lambda wildcards: [picture["path"] for picture in page_pictures(wildcards.paper)],
        inside=lambda wildcards: inside_pictures(wildcards.paper),
    output:
        notebook=f"{PAPER}/report.ipynb",
        html=report(f"{PAPER}/report.html", caption="../captions/notebook.rst", category="{paper}", labels={"what": "notebook"}),
        card=f"{PAPER}/card.md",
    log:
        log_of(PAPER, "notebook"),
    benchmark:
        benchmark_of(PAPER, "notebook")
    resources:
        mem_mb=memory_of(2000),
    params:
        scale=config["scale"],
        code=code("notebook.py"),
    script:
        "../scripts/notebook.py"


rule index:
    input:
        cells=f"{RESULTS}/cells.parquet",
        cross=[f"{RESULTS}/cross.html"] if GRID.papers_of("image") else [],
        claims=[f"{RESULTS}/papers/{paper}/claims.csv" for paper in GRID.papers],
        tables=[f"{RESULTS}/papers/{paper}/tables" for paper in GRID.papers],
        figures=[f"{RESULTS}/papers/{paper}/figures" for paper in GRID.papers],
        pictures=[picture["path"] for paper in GRID.papers for picture in page_pictures(paper)],
        reports=[f"{RESULTS}/papers/{paper}/report.html" for paper in GRID.papers],
        sheets=[f"{RESULTS}/figures/triggers_{dataset}.png" for dataset in used_datasets()],
        manifests=list(used_manifests().values()),
    output:
        page=f"{RESULTS}/index.html",
        claims=report(f"{RESULTS}/claims.csv", caption="../captions/claims.rst", category="all papers"),
        provenance=report(f"{RESULTS}/provenance.json", caption="../captions/provenance.rst", category="all papers"),
    log:
        log_of(RESULTS, "index"),
    benchmark:
        benchmark_of(RESULTS, "index")
    params:
        scale=config["scale"],
        config=config,
        papers=paper_headers(),
        datasets=list(used_manifests()),
        seeds=used_seeds(),
        benchmarks=f"{config['results']}/benchmark/{config['scale']}",
        data=data_folder,
        root=workflow.basedir,
        code=code("index.py", also=TEMPLATES),
    script:
        "../scripts/index.py"
