# A run as an RO-Crate, to be deposited or sent: `snakemake crate`


rule crate:
    """The run as an RO-Crate, to be deposited or sent."""
    input:
        f"{RESULTS}/crate",


rule make_crate:
    """Code, settings, results and checksums in one folder."""
    input:
        report=lambda wildcards: sum(index_files(wildcards).values(), [f"{RESULTS}/cells.parquet"]),
        pages=[*rules.index.output, *comparison()],
        provenance=f"{RESULTS}/provenance.json",
        manifests=list(used_manifests().values()),
    output:
        crate=directory(f"{RESULTS}/crate"),
    log:
        PATHS.log(RESULTS, "crate"),
    benchmark:
        PATHS.benchmark(RESULTS, "crate")
    params:
        config=SETTINGS,
        papers=lambda wildcards: [paper_header(paper) for paper in GRID.papers],
        benchmarks=here(f"{config['results']}/benchmark/{config['scale']}"),
        root=ROOT,
        code=code("crate.py"),
    script:
        "../scripts/crate.py"
