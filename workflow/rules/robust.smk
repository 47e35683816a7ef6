# Robust training: data -> network trained with an objective -> evaluations of it


rule train_robust:
    """A network trained with an objective, and its clean accuracy."""
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
        data=image_data,
        device=config["device"],
        code=code("train_robust.py"),
    script:
        "../scripts/train_robust.py"


rule attack_network:
    """One evaluation of a network."""
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
        data=image_data,
        device=config["device"],
        code=of_path(lambda cell: code_digest(SCRIPTS / "attack_network.py", *ROBUST.evaluation_code(cell))),
    script:
        "../scripts/attack_network.py"
