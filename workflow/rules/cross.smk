# Every defence beside every other: one sortable page, with ranks and Pareto fronts


def cell_users():
    """Papers that use a purified cell, by its folder: the tidy table names the first only."""
    users = {}
    for paper in GRID.papers:
        for cell in GRID.cells("purified", paper):
            users.setdefault(cell_folder(cell), []).append(paper)
    return users


rule cross:
    input:
        cells=f"{RESULTS}/cells.parquet",
    output:
        page=f"{RESULTS}/cross.html",
        table=f"{RESULTS}/cross.csv",
        figures=directory(f"{RESULTS}/cross"),
    log:
        log_of(RESULTS, "cross"),
    benchmark:
        benchmark_of(RESULTS, "cross")
    params:
        labels={name: label for paper in GRID.papers for name, label in labels_of(paper).items()},
        users=cell_users(),
        scale=config["scale"],
        code=code_digest(SCRIPTS / "cross.py"),
    script:
        "../scripts/cross.py"
