# The networks that the authors released, measured under the published protocol


include: "released.smk"


rule attack_released:
    """One network that the authors released, measured."""
    input:
        network=lambda wildcards: released_networks()[wildcards.method],
        images=f"{DATA}/mnist/test_images.npy",
        manifest=f"{DATA}/mnist/manifest.json",
    output:
        record=f"{RELEASED}/{{method}}.json",
    log:
        log_of(RELEASED, "{method}"),
    benchmark:
        benchmark_of(RELEASED, "{method}")
    wildcard_constraints:
        method=r"[a-z0-9]+",
    resources:
        gpu=GPU,
        vram_mb=2000,
        mem_mb=memory_of(3000),
        runtime=60,
    params:
        spec=lambda wildcards: released_plan().released("mnist"),
        device=config["device"],
        code=code_digest(RELEASED_SCRIPTS / "attack_released.py"),
    script:
        "scripts/attack_released.py"


rule released_weights:
    """The networks that the authors of proper_interpretability released, measured."""
    input:
        lambda wildcards: [f"{RELEASED}/{method}.json" for method in released_networks()],
    output:
        table=f"{RELEASED}/table.csv",
        figure=f"{RELEASED}/ata.png",
    log:
        log_of(RELEASED, "table"),
    benchmark:
        benchmark_of(RELEASED, "table")
    localrule: True
    params:
        labels=lambda wildcards: released_plan().labels(),
        code=code_digest(RELEASED_SCRIPTS / "released_weights.py", GRID.file("proper_interpretability", "report.py")),
    script:
        "scripts/released_weights.py"
