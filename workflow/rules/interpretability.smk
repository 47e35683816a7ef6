# data -> network trained with an objective -> evaluations of it; and the networks that the authors released


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
        code=code("train_robust.py"),
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
        code=code("attack_network.py"),
    script:
        "../scripts/attack_network.py"


rule report_interpretability:
    input:
        cells=f"{RESULTS}/cells.parquet",
        arrays=attacked_files,
    output:
        claims=f"{RESULTS}/papers/{{paper}}/claims.csv",
        tables=directory(f"{RESULTS}/papers/{{paper}}/tables"),
        figures=directory(f"{RESULTS}/papers/{{paper}}/figures"),
    log:
        log_of(RESULTS, "papers/{paper}/report_interpretability"),
    benchmark:
        benchmark_of(RESULTS, "papers/{paper}/report_interpretability")
    wildcard_constraints:
        paper=only(GRID.papers_of("interpretability")),
    params:
        scale=config["scale"],
        labels=robust_labels,
        facts=robust_facts,
        claims=lambda wildcards: claims_of(wildcards.paper),
        title=lambda wildcards: GRID.experiments[wildcards.paper]["title"],
        code=code("report_interpretability.py"),
    script:
        "../scripts/report_interpretability.py"


rule attack_released:
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
        spec=released_spec,
        device=config["device"],
        code=code("attack_released.py"),
    script:
        "../scripts/attack_released.py"


rule released_weights:
    input:
        released_records,
    output:
        table=f"{RELEASED}/table.csv",
        figure=f"{RELEASED}/ata.png",
    log:
        log_of(RELEASED, "table"),
    benchmark:
        benchmark_of(RELEASED, "table")
    params:
        labels=released_labels,
        code=code("released_weights.py"),
    script:
        "../scripts/released_weights.py"
