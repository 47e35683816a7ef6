# The networks that the authors released, measured under the published protocol

RELEASED = f"{RESULTS}/robust/released_weights"
RELEASED_SCRIPTS = GRID.file("proper_interpretability", "scripts")


def released_networks():
    """Methods of which the user's folder has the authors' network for MNIST Small."""
    folder = config["released_weights"]
    if not folder:
        raise WorkflowError(
            "config.yaml: released_weights is not set: give the folder `networks` of the repository of proper_interpretability"
        )
    files = {method: f"{folder}/mnist_smallgap_{method}_100.pkl" for method in ROBUST.entries["defences"]}
    found = {method: file for method, file in files.items() if os.path.isfile(file)}
    if not found:
        raise WorkflowError(f"config.yaml: released_weights: {folder} has no file mnist_smallgap_<method>_100.pkl")
    return found


rule attack_released:
    """One network that the authors released, measured."""
    input:
        network=lambda wildcards: released_networks()[wildcards.defence],
        images=f"{DATA}/images/mnist/test_images.npy",
        manifest=f"{DATA}/images/mnist/manifest.json",
    output:
        record=f"{RELEASED}/{{defence}}.json",
    log:
        log_of(RELEASED, "{defence}"),
    benchmark:
        benchmark_of(RELEASED, "{defence}")
    resources:
        **training(2000, 3000, smoke=60, demo=60, bench=60, paper=60),
    params:
        spec=ROBUST.released("mnist"),
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
        labels=ROBUST.labels("defences"),
        code=code_digest(RELEASED_SCRIPTS / "released_weights.py", GRID.file("proper_interpretability", "report.py")),
    script:
        "scripts/released_weights.py"
