# Robust training: data -> network trained with an objective -> evaluations of it


rule train_robust:
    """A network trained with an objective, and its clean accuracy."""
    input:
        ancient(image_files),
    output:
        model=f"{TRAINED}/model.safetensors",
        history=f"{TRAINED}/history.csv",
        metrics=f"{TRAINED}/metrics.json",
    log:
        PATHS.log(TRAINED, "train"),
    benchmark:
        PATHS.benchmark(TRAINED, "train")
    retries: 1
    resources:
        **training(4000, robust_memory, demo=15, desk=180, bench=1440, paper=2880),
    params:
        spec=of_path(ROBUST.training),
        data=image_content,
        code=code("train_robust.py"),
    script:
        "../scripts/train_robust.py"


rule attack_network:
    """One evaluation of a network."""
    input:
        ancient(image_files),
        model=rules.train_robust.output.model,
        before=rules.train_robust.output.metrics,
    output:
        arrays=f"{ATTACKED}/evaluation.npz",
        metrics=f"{ATTACKED}/metrics.json",
    log:
        PATHS.log(ATTACKED, "attack"),
    benchmark:
        PATHS.benchmark(ATTACKED, "attack")
    retries: 1
    resources:
        **training(6000, 4000, demo=15, bench=240, paper=1440),
    params:
        spec=of_path(ROBUST.training),
        evaluation=of_path(ROBUST.evaluation),
        data=image_content,
        code=of_path(lambda cell: code_digest(SCRIPTS / "attack_network.py", *ROBUST.evaluation_code(cell))),
    script:
        "../scripts/attack_network.py"
