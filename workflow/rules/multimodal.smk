# data -> base model (where it is built here) -> poisoned set, triggered test -> victim -> attention -> filters -> refit


include: "multimodal_common.smk"


ruleorder: prepare_multimodal > prepare_dataset
ruleorder: train_multimodal > train_victim


rule prepare_multimodal:
    output:
        manifest=f"{DATA}/{{dataset}}/manifest.json",
    log:
        "logs/data/{dataset}.log",
    benchmark:
        f"{config['results']}/benchmark/data/{{dataset}}.tsv"
    wildcard_constraints:
        dataset=only(multimodal_names("datasets")),
    retries: 1
    resources:
        mem_mb=memory_of(4000),
        runtime=120,
    params:
        spec=multimodal_dataset,
        sources=config["data"]["sources"],
        mirror=config["data"]["mirror"],
        cache=config["data"]["cache"],
    script:
        "../scripts/prepare_multimodal.py"


rule build_model:
    input:
        manifest=f"{DATA}/{{dataset}}/manifest.json",
    output:
        model=directory(f"{BASE}/model"),
        history=f"{BASE}/history.csv",
        record=f"{BASE}/base.json",
    log:
        log_of(BASE, "build"),
    benchmark:
        benchmark_of(BASE, "build")
    wildcard_constraints:
        dataset=only(multimodal_names("datasets")),
    threads: CHAIN_THREADS
    resources:
        gpu=GPU,
        vram_mb=24000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 60, "paper": 240}),
    params:
        spec=base_spec,
        sources=config["data"]["sources"],
        mirror=config["data"]["mirror"],
        cache=config["data"]["cache"],
        device=config["device"],
        code=code("build_model.py"),
    script:
        "../scripts/build_model.py"


rule poison_samples:
    input:
        manifest=f"{DATA}/{{dataset}}/manifest.json",
    output:
        manifest=f"{POISONED}/manifest.json",
        record=f"{POISONED}/poison.json",
    log:
        log_of(POISONED, "poison"),
    benchmark:
        benchmark_of(POISONED, "poison")
    wildcard_constraints:
        dataset=only(multimodal_names("datasets")),
    resources:
        mem_mb=memory_of(2000),
        runtime=30,
    params:
        spec=poison_spec,
        code=code("poison_samples.py"),
    script:
        "../scripts/poison_samples.py"


rule trigger_samples:
    input:
        manifest=f"{DATA}/{{dataset}}/manifest.json",
    output:
        manifest=f"{TRIGGERED}/manifest.json",
        record=f"{TRIGGERED}/poison.json",
    log:
        log_of(TRIGGERED, "trigger"),
    benchmark:
        benchmark_of(TRIGGERED, "trigger")
    wildcard_constraints:
        dataset=only(multimodal_names("datasets")),
    resources:
        mem_mb=memory_of(2000),
        runtime=30,
    params:
        spec=poison_spec,
        code=code("poison_samples.py"),
    script:
        "../scripts/poison_samples.py"


rule train_multimodal:
    input:
        data=f"{DATA}/{{dataset}}/manifest.json",
        poisoned=f"{POISONED}/manifest.json",
        triggered=f"{TRIGGERED}/manifest.json",
        base=base_model,
    output:
        model=kept(directory(f"{VICTIM}/model")),
        history=f"{VICTIM}/history.csv",
        clean=f"{VICTIM}/answers_clean.parquet",
        triggered=f"{VICTIM}/answers_triggered.parquet",
        metrics=f"{VICTIM}/metrics.json",
    log:
        log_of(VICTIM, "victim"),
    benchmark:
        benchmark_of(VICTIM, "victim")
    wildcard_constraints:
        dataset=only(multimodal_names("datasets")),
    retries: 1
    threads: CHAIN_THREADS
    resources:
        gpu=GPU,
        vram_mb=40000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 60, "paper": 720}),
    params:
        spec=multimodal_victim_spec,
        device=config["device"],
        code=code("train_multimodal.py"),
    script:
        "../scripts/train_multimodal.py"


rule read_attention:
    input:
        data=f"{DATA}/{{dataset}}/manifest.json",
        poisoned=f"{POISONED}/manifest.json",
        triggered=f"{TRIGGERED}/manifest.json",
        victim=f"{VICTIM}/model",
        before=f"{VICTIM}/metrics.json",
    output:
        entropies=f"{FILTERED}/entropies.parquet",
        maps=f"{FILTERED}/maps.npz",
        record=f"{FILTERED}/attention.json",
    log:
        log_of(FILTERED, "attention"),
    benchmark:
        benchmark_of(FILTERED, "attention")
    wildcard_constraints:
        dataset=only(multimodal_names("datasets")),
    retries: 1
    resources:
        gpu=GPU,
        vram_mb=40000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 60, "paper": 240}),
    params:
        spec=multimodal_victim_spec,
        device=config["device"],
        code=code("read_attention.py"),
    script:
        "../scripts/read_attention.py"


rule measure_filters:
    input:
        entropies=f"{FILTERED}/entropies.parquet",
        attention=f"{FILTERED}/attention.json",
        poisoned=f"{POISONED}/manifest.json",
    output:
        flags=expand(f"{FILTERED}/flags/{{name}}.json", name=flag_names(), allow_missing=True),
        record=f"{FILTERED}/filters.json",
        metrics=f"{FILTERED}/metrics.json",
    log:
        log_of(FILTERED, "filters"),
    benchmark:
        benchmark_of(FILTERED, "filters")
    wildcard_constraints:
        dataset=only(multimodal_names("datasets")),
    resources:
        mem_mb=memory_of(2000),
        runtime=30,
    params:
        spec=multimodal_victim_spec,
        asked=filter_specs,
        code=code("measure_filters.py"),
    script:
        "../scripts/measure_filters.py"


rule refit:
    input:
        data=f"{DATA}/{{dataset}}/manifest.json",
        poisoned=f"{POISONED}/manifest.json",
        triggered=f"{TRIGGERED}/manifest.json",
        base=base_model,
        victim=f"{VICTIM}/model",
        before=f"{VICTIM}/metrics.json",
        # one job decides for all filters: its date says nothing of this one, whose settings and code are params here
        flags=ancient(flags_of_defence),
    output:
        history=f"{CLEANED}/history.csv",
        clean=f"{CLEANED}/answers_clean.parquet",
        triggered=f"{CLEANED}/answers_triggered.parquet",
        metrics=f"{CLEANED}/metrics.json",
    log:
        log_of(CLEANED, "refit"),
    benchmark:
        benchmark_of(CLEANED, "refit")
    wildcard_constraints:
        dataset=only(multimodal_names("datasets")),
        defence=only(multimodal_defences("filter")),
    retries: 1
    resources:
        gpu=GPU,
        vram_mb=40000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 60, "paper": 720}),
    params:
        spec=multimodal_victim_spec,
        defence=multimodal_defence_spec,
        device=config["device"],
        code=code("refit.py", also=(SCRIPTS / "measure_filters.py",)),
    script:
        "../scripts/refit.py"


rule purify_pictures:
    input:
        data=f"{DATA}/{{dataset}}/manifest.json",
        triggered=f"{TRIGGERED}/manifest.json",
        victim=f"{VICTIM}/model",
        before=f"{VICTIM}/metrics.json",
    output:
        history=f"{CLEANED}/history.csv",
        clean=f"{CLEANED}/answers_clean.parquet",
        triggered=f"{CLEANED}/answers_triggered.parquet",
        metrics=f"{CLEANED}/metrics.json",
    log:
        log_of(CLEANED, "purify_pictures"),
    benchmark:
        benchmark_of(CLEANED, "purify_pictures")
    wildcard_constraints:
        dataset=only(multimodal_names("datasets")),
        defence=only(multimodal_defences("pictures")),
    retries: 1
    resources:
        gpu=GPU,
        vram_mb=40000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 60, "paper": 720}),
    params:
        spec=multimodal_victim_spec,
        defence=multimodal_defence_spec,
        device=config["device"],
        code=code("purify_pictures.py"),
    script:
        "../scripts/purify_pictures.py"


rule report_multimodal:
    input:
        cells=f"{RESULTS}/cells.parquet",
        records=filtered_records,
        bases=base_records,
        manifests=lambda wildcards: [f"{DATA}/{name}/manifest.json" for name in MULTIMODAL[wildcards.paper].used("dataset")],
        reported=lambda wildcards: sorted(str(path) for path in GRID.file(wildcards.paper, "reported").glob("*.csv")),
    output:
        claims=f"{RESULTS}/papers/{{paper}}/claims.csv",
        tables=directory(f"{RESULTS}/papers/{{paper}}/tables"),
        figures=directory(f"{RESULTS}/papers/{{paper}}/figures"),
    log:
        log_of(RESULTS, "papers/{paper}/report_multimodal"),
    benchmark:
        benchmark_of(RESULTS, "papers/{paper}/report_multimodal")
    wildcard_constraints:
        paper=only(GRID.papers_of("multimodal")),
    params:
        scale=config["scale"],
        data=DATA,
        about=multimodal_report,
        claims=lambda wildcards: claims_of(wildcards.paper),
        title=lambda wildcards: GRID.experiments[wildcards.paper]["title"],
        code=code("report_multimodal.py"),
    script:
        "../scripts/report_multimodal.py"
