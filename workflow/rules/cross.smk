# Every defence beside every other: one sortable page, with ranks and Pareto fronts


rule cross:
    input:
        cells=f"{RESULTS}/cells.parquet",
    output:
        page=report(f"{RESULTS}/cross.html", caption="../captions/cross.rst", category="all papers"),
        table=f"{RESULTS}/cross.csv",
        figures=directory(f"{RESULTS}/cross"),
    log:
        log_of(RESULTS, "cross"),
    benchmark:
        benchmark_of(RESULTS, "cross")
    params:
        labels={name: label for paper in GRID.papers_of("image") for name, label in labels_of(paper).items()},
        papers=GRID.papers_of("image"),
        scale=config["scale"],
        code=code("cross.py", also=TEMPLATES),
    script:
        "../scripts/cross.py"
