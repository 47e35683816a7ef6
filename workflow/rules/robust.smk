# Robust training: data -> network trained with an objective -> evaluations of it; and networks that authors released

TRAINED, ATTACKED = (PATHS.stage("robust", stage) for stage in ("trained", "attacked"))
RELEASED = f"{RESULTS}/robust/released"


def robust_memory(wildcards):
    """Images of 224x224 are many times larger, and held twice."""
    return 24000 if wildcards.dataset == "restricted_imagenet" else 3000


def released_networks():
    """Methods of which the user's folder has the authors' network for MNIST Small."""
    folder = config["released_weights"]
    if not folder:
        raise WorkflowError("config.yaml: released_weights is not set: give the folder `networks` of the authors' repository")
    files = {method: f"{folder}/mnist_smallgap_{method}_100.pkl" for method in ROBUST.entries["defences"]}
    found = {method: file for method, file in files.items() if os.path.isfile(file)}
    if not found:
        raise WorkflowError(f"config.yaml: released_weights: {folder} has no file mnist_smallgap_<method>_100.pkl")
    return found


rule train_robust:
    input:
        image_files,
    output:
        model=f"{TRAINED}/model.safetensors",
        history=f"{TRAINED}/history.csv",
        metrics=f"{TRAINED}/metrics.json",
    log:
        log_of(TRAINED, "train"),
    benchmark:
        benchmark_of(TRAINED, "train")
    retries: 1
    resources:
        **training(4000, robust_memory, demo=15, bench=1440, paper=2880),
    params:
        spec=of_path(ROBUST.training),
        data=f"{DATA}/images",
        device=config["device"],
        code=code("train_robust.py"),
    script:
        "../scripts/train_robust.py"


rule attack_network:
    input:
        image_files,
        model=f"{TRAINED}/model.safetensors",
        before=f"{TRAINED}/metrics.json",
    output:
        arrays=f"{ATTACKED}/evaluation.npz",
        metrics=f"{ATTACKED}/metrics.json",
    log:
        log_of(ATTACKED, "attack"),
    benchmark:
        benchmark_of(ATTACKED, "attack")
    retries: 1
    resources:
        **training(6000, 4000, demo=15, bench=240, paper=1440),
    params:
        spec=of_path(ROBUST.training),
        evaluation=of_path(ROBUST.evaluation),
        data=f"{DATA}/images",
        device=config["device"],
        code=code("attack_network.py"),
    script:
        "../scripts/attack_network.py"


rule attack_released:
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
        code=code("attack_released.py"),
    script:
        "../scripts/attack_released.py"


rule released_weights:
    """The networks that the authors of a paper on robust training released, measured."""
    localrule: True
    input:
        lambda wildcards: [f"{RELEASED}/{method}.json" for method in released_networks()],
    output:
        table=f"{RELEASED}/table.csv",
        figure=f"{RELEASED}/ata.png",
    log:
        log_of(RELEASED, "table"),
    benchmark:
        benchmark_of(RELEASED, "table")
    params:
        labels=ROBUST.labels("defences"),
        code=code("released_weights.py"),
    script:
        "../scripts/released_weights.py"
