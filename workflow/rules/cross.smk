# Every defence beside every other: one sortable page, with ranks and Pareto fronts


rule cross:
    """Every defence beside every other, on one page."""
    input:
        cells=f"{RESULTS}/cells.parquet",
    output:
        page=report(f"{RESULTS}/cross.html", caption="../captions/cross.rst", category="all papers"),
        table=f"{RESULTS}/cross.csv",
        figures=directory(f"{RESULTS}/cross"),
    log:
        PATHS.log(RESULTS, "cross"),
    benchmark:
        PATHS.benchmark(RESULTS, "cross")
    localrule: True
    params:
        labels=lambda wildcards: {
            name: label for paper in GRID.papers_of("images") for name, label in report_of(paper)["labels"]["defences"].items()
        },
        papers=GRID.papers_of("images"),
        run={**SITE, "registry": registry(GRID.papers_of("images")[0]) if SITE["cross"] else []},
        code=code_digest(SCRIPTS / "cross.py", *TEMPLATES),
    script:
        "../scripts/cross.py"
