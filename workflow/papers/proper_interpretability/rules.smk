# The networks that the authors released, measured under the published protocol


from cupel import files


include: "released.smk"


rule attack_released:
    """One network that the authors released, measured."""
    input:
        network=ancient(lambda wildcards: released_networks()[wildcards.defence]),
        images=ancient(f"{DATA}/images/mnist/test_images.npy"),
        manifest=ancient(f"{DATA}/images/mnist/manifest.json"),
    output:
        record=f"{RELEASED}/{{defence}}.json",
    log:
        PATHS.log(RELEASED, "{defence}"),
    benchmark:
        PATHS.benchmark(RELEASED, "{defence}")
    resources:
        **training(2000, 3000, smoke=60, demo=60, bench=60, paper=60),
    params:
        spec=ROBUST.released("mnist"),
        network=lambda wildcards: files.digest(released_networks()[wildcards.defence]),
        data=lambda wildcards: image_content({"dataset": "mnist"}),
        code=code_digest(
            RELEASED_SCRIPTS / "attack_released.py", *ROBUST.evaluation_code({"evaluation": "released", "dataset": "mnist"})
        ),
    script:
        "scripts/attack_released.py"


rule released_weights:
    """The networks that the authors of Proper Interpretability released, measured, and the claims judged on them."""
    input:
        records=lambda wildcards: [f"{RELEASED}/{method}.json" for method in released_networks()],
        claims=GRID.file("proper_interpretability", "claims.yaml"),
        trained=lambda wildcards: trained_verdicts(),
    output:
        table=f"{RELEASED}/table.csv",
        figure=f"{RELEASED}/ata.png",
        verdicts=f"{RELEASED}/claims.csv",
    log:
        PATHS.log(RELEASED, "table"),
    benchmark:
        PATHS.benchmark(RELEASED, "table")
    localrule: True
    params:
        scale=config["scale"],
        labels=ROBUST.labels("defences"),
        code=code_digest(RELEASED_SCRIPTS / "released_weights.py", GRID.file("proper_interpretability", "report.py")),
    script:
        "scripts/released_weights.py"
