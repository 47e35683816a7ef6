# cells + claims.yaml -> verdicts: a claim edited is judged again, and pages are made anew; nothing is drawn or trained


rule judge_claims:
    """Verdicts on the claims of one paper; a paper may have none."""
    input:
        cells=f"{RESULTS}/cells.parquet",
        claims=lambda wildcards: local(paper_file(wildcards.paper, "claims.yaml")),
    output:
        report(f"{PAPER}/claims.csv", caption="../captions/claims.rst", category="{paper}", labels={"what": "claims"}),
    log:
        PATHS.log(PAPER, "judge_claims"),
    benchmark:
        PATHS.benchmark(PAPER, "judge_claims")
    localrule: True
    params:
        scale=config["scale"],
        code=code_digest(SCRIPTS / "judge_claims.py"),
    script:
        "../scripts/judge_claims.py"
