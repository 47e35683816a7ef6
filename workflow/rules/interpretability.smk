# data -> network trained with an objective -> evaluations of it


rule train_robust:
    input:
        dataset_files,
    output:
        model=f"{TRAINED}/model.safetensors",
        history=f"{TRAINED}/history.csv",
        metrics=f"{TRAINED}/metrics.json",
    log:
        log_of(TRAINED, "train"),
    benchmark:
        benchmark_of(TRAINED, "train")
    wildcard_constraints:
        model="small|pool|wresnet",
        method=r"[a-z0-9_~]+",
    retries: 1
    resources:
        gpu=GPU,
        vram_mb=4000,
        mem_mb=robust_memory,
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 1440, "paper": 2880}),
    params:
        spec=robust_spec,
        data=data_folder,
        device=config["device"],
        code=code_digest(SCRIPTS / "train_robust.py"),
    script:
        "../scripts/train_robust.py"


rule attack_network:
    input:
        dataset_files,
        model=f"{TRAINED}/model.safetensors",
        before=f"{TRAINED}/metrics.json",
    output:
        arrays=f"{ATTACKED}/evaluation.npz",
        metrics=f"{ATTACKED}/metrics.json",
    log:
        log_of(ATTACKED, "attack"),
    benchmark:
        benchmark_of(ATTACKED, "attack")
    wildcard_constraints:
        model="small|pool|wresnet",
        method=r"[a-z0-9_~]+",
        evaluation=r"[a-z0-9_]+",
    retries: 1
    resources:
        gpu=GPU,
        vram_mb=6000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 240, "paper": 1440}),
    params:
        spec=robust_spec,
        evaluation=evaluation_spec,
        data=data_folder,
        device=config["device"],
        code=code_digest(SCRIPTS / "attack_network.py"),
    script:
        "../scripts/attack_network.py"
