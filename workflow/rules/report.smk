# cells -> one tidy table -> tables, figures and a notebook per paper -> index.html


include: "report_common.smk"


rule gather_cells:
    """The tidy table of all cells."""
    input:
        # those of blocks know their rule, which Snakemake need not look for
        [BLOCK_METRICS.get(file, file) for file in cell_files()],
    output:
        cells=f"{RESULTS}/cells.parquet",
    log:
        PATHS.log(RESULTS, "gather_cells"),
    benchmark:
        PATHS.benchmark(RESULTS, "gather_cells")
    localrule: True
    params:
        cells=expected_cells(),
        gates={paper: GRID.gate(paper) for paper in GRID.papers},
        code=code_digest(SCRIPTS / "gather_cells.py"),
    script:
        "../scripts/gather_cells.py"


rule report_paper:
    """Tables and figures of one paper."""
    input:
        lambda wildcards: brought(histories(wildcards.paper)),
        unpack(lambda wildcards: report_of(wildcards.paper)["files"]),
        cells=f"{RESULTS}/cells.parquet",
        reported=lambda wildcards: local(sorted(str(path) for path in GRID.file(wildcards.paper, "reported").glob("*.csv"))),
    output:
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
            patterns=["{name}.svg"],
            caption="../captions/figure.rst",
            category="{paper}",
            subcategory="figures",
            labels={"what": "{name}"},
        ),
    log:
        PATHS.log(PAPER, "report_paper"),
    benchmark:
        PATHS.benchmark(PAPER, "report_paper")
    localrule: True
    params:
        scale=config["scale"],
        title=lambda wildcards: GRID.experiments[wildcards.paper]["title"],
        labels=lambda wildcards: report_of(wildcards.paper)["labels"],
        facts=lambda wildcards: report_of(wildcards.paper)["facts"],
        report=lambda wildcards: GRID.report_key(wildcards.paper),
        registry=lambda wildcards: registry(wildcards.paper),
        code=lambda wildcards: code_digest(SCRIPTS / "report_paper.py", report_file(GRID.report_key(wildcards.paper))),
    script:
        "../scripts/report_paper.py"


rule feature_maps:
    """Maps of penultimate features of victims and purified models."""
    input:
        lambda wildcards: feature_figure(wildcards.paper)["files"],
        ancient(lambda wildcards: image_files({"dataset": Path(feature_figure(wildcards.paper)["folder"]).name})),
    output:
        figure=report(
            f"{PAPER}/features.svg", caption="../captions/features.rst", category="{paper}", labels={"what": "features"}
        ),
        table=f"{PAPER}/features.csv",
    log:
        PATHS.log(PAPER, "feature_maps"),
    benchmark:
        PATHS.benchmark(PAPER, "feature_maps")
    resources:
        mem_mb=memory_of(4000),
    params:
        spec=lambda wildcards: feature_figure(wildcards.paper)["spec"],
        folder=lambda wildcards: feature_figure(wildcards.paper)["folder"],
        code=lambda wildcards: code_digest(SCRIPTS / "feature_maps.py", *feature_figure(wildcards.paper)["code"]),
    script:
        "../scripts/feature_maps.py"


rule contact_sheet:
    """Triggers on a data set: figures (of the chosen papers), zoo (of every attack), gallery (those that are formulas)."""
    input:
        ancient(image_files),
        triggers=lambda wildcards: [path for _, path in sheet_attacks(wildcards.sheet, wildcards.dataset).values() if path],
    output:
        sheet=report(
            f"{RESULTS}/{{sheet}}/triggers_{{dataset}}.png",
            caption="../captions/triggers.rst",
            category="triggers",
            labels={"what": "{dataset}"},
        ),
        pictures=directory(f"{RESULTS}/{{sheet}}/triggers_{{dataset}}"),
    log:
        PATHS.log(RESULTS, "{sheet}/triggers_{dataset}"),
    benchmark:
        PATHS.benchmark(RESULTS, "{sheet}/triggers_{dataset}")
    wildcard_constraints:
        sheet="figures|zoo|gallery",
    localrule: True
    params:
        attacks=lambda wildcards: {
            name: (attack, path and here(path))
            for name, (attack, path) in sheet_attacks(wildcards.sheet, wildcards.dataset).items()
        },
        folder=here(f"{DATA}/images/{{dataset}}"),
        code=sheet_code,
    script:
        "../scripts/contact_sheet.py"


rule notebook:
    """The notebook of one paper, executed, and its card."""
    input:
        notebook=lambda wildcards: local(str(notebook_file(wildcards.paper))),
        card=lambda wildcards: local(paper_file(wildcards.paper, "card.yaml")),
        cells=f"{RESULTS}/cells.parquet",
        claims=f"{PAPER}/claims.csv",
        tables=f"{PAPER}/tables",
        figures=f"{PAPER}/figures",
        pictures=lambda wildcards: [picture["path"] for picture in page_pictures(wildcards.paper)],
        numbers=lambda wildcards: brought(picture_tables(wildcards.paper)),
    output:
        notebook=f"{PAPER}/report.ipynb",
        card=f"{PAPER}/card.md",
    log:
        PATHS.log(PAPER, "notebook"),
    benchmark:
        PATHS.benchmark(PAPER, "notebook")
    localrule: True
    resources:
        mem_mb=memory_of(2000),
    params:
        parameters=lambda wildcards, input: {
            "folder": here(PAPER.format(**wildcards)),
            "scale": config["scale"],
            "pictures": list(map(str, input.pictures)),
        },
        code=code_digest(SCRIPTS / "run_notebook.py"),
    script:
        "../scripts/run_notebook.py"


rule paper_page:
    """The page of one paper."""
    input:
        card=lambda wildcards: local(paper_file(wildcards.paper, "card.yaml")),
        claims=lambda wildcards: local(paper_file(wildcards.paper, "claims.yaml")),
        cells=f"{RESULTS}/cells.parquet",
        verdicts=f"{PAPER}/claims.csv",
        tables=f"{PAPER}/tables",
        figures=f"{PAPER}/figures",
        pictures=lambda wildcards: [picture["path"] for picture in page_pictures(wildcards.paper)],
        numbers=lambda wildcards: brought(picture_tables(wildcards.paper)),
        notebook=f"{PAPER}/report.ipynb",
    output:
        page=report(f"{PAPER}/report.html", caption="../captions/paper.rst", category="{paper}", labels={"what": "page"}),
    log:
        PATHS.log(PAPER, "page"),
    benchmark:
        PATHS.benchmark(PAPER, "page")
    localrule: True
    params:
        header=lambda wildcards: paper_header(wildcards.paper),
        run=SITE,
        code=code_digest(SCRIPTS / "paper_page.py", *TEMPLATES),
    script:
        "../scripts/paper_page.py"


rule cells_page:
    """The page of all cells."""
    input:
        cells=f"{RESULTS}/cells.parquet",
        sheets=[f"{RESULTS}/figures/triggers_{dataset}.png" for dataset in sorted(IMAGES.used("dataset"))],
        triggers=[f"{RESULTS}/figures/triggers_{dataset}" for dataset in sorted(IMAGES.used("dataset"))],
        cell_files=lambda wildcards: brought([*cell_files(), *histories(), *used_manifests().values()]),
    output:
        page=report(f"{RESULTS}/cells.html", caption="../captions/cells.rst", category="all papers"),
    log:
        PATHS.log(RESULTS, "cells_page"),
    benchmark:
        PATHS.benchmark(RESULTS, "cells_page")
    localrule: True
    params:
        cells=expected_cells(),
        run={
            **SITE,
            "config": {**SETTINGS, "results": here(config["results"])},
            "data": here(f"{DATA}/images"),
            "families": known_entries(),
        },
        code=code_digest(SCRIPTS / "cells_page.py", *TEMPLATES),
    script:
        "../scripts/cells_page.py"


rule index:
    """The first page, and that of the claims."""
    input:
        unpack(index_files),
        cells=f"{RESULTS}/cells.parquet",
    output:
        page=f"{RESULTS}/index.html",
        claims_page=report(f"{RESULTS}/claims.html", caption="../captions/claims.rst", category="all papers"),
        claims=report(f"{RESULTS}/claims.csv", caption="../captions/claims.rst", category="all papers"),
        provenance=report(f"{RESULTS}/provenance.json", caption="../captions/provenance.rst", category="all papers"),
    log:
        PATHS.log(RESULTS, "index"),
    benchmark:
        PATHS.benchmark(RESULTS, "index")
    localrule: True
    params:
        papers=[paper_header(paper) for paper in GRID.papers],
        run={
            "config": SETTINGS,
            "root": ROOT,
            "data": here(DATA),
            "datasets": list(used_manifests()),
            "seeds": sorted({int(cell["seed"]) for cell in GRID.cells()}),
            "benchmarks": here(f"{config['results']}/benchmark/{config['scale']}"),
            "budgets": planned_budgets(),
            "compare": SITE["compare"],
        },
        code=code_digest(SCRIPTS / "index.py", *TEMPLATES),
    script:
        "../scripts/index.py"


rule compare:
    """This run beside another: verdicts and numbers that differ."""
    input:
        runs=[f"{folder}/{name}" for folder in compared() for name in ("cells.parquet", "claims.csv")],
        provenance=f"{RESULTS}/provenance.json",
    output:
        page=report(f"{RESULTS}/compare.html", caption="../captions/compare.rst", category="all papers"),
        tables=[f"{RESULTS}/agreement.csv", f"{RESULTS}/claims_agreement.csv"],
        figure=f"{RESULTS}/agreement.svg",
    log:
        PATHS.log(RESULTS, "compare"),
    benchmark:
        PATHS.benchmark(RESULTS, "compare")
    localrule: True
    params:
        folders=compared(),
        run=SITE,
        code=code_digest(SCRIPTS / "compare.py", *TEMPLATES),
    script:
        "../scripts/compare.py"
