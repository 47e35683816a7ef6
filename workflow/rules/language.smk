# Papers on language models: model and texts -> poisoned texts -> victim -> purified -> report


include: "language_common.smk"


rule prepare_text:
    output:
        records=f"{DATA}/text/{{text}}/records.jsonl",
        manifest=f"{DATA}/text/{{text}}/manifest.json",
    log:
        "logs/data/text/{text}.log",
    benchmark:
        f"{config['results']}/benchmark/data/text/{{text}}.tsv"
    wildcard_constraints:
        text=r"[a-z0-9_]+",
    retries: 1
    resources:
        mem_mb=memory_of(1000),
        runtime=30,
    params:
        sources=config["data"]["sources"],
        mirror=config["data"]["mirror"],
        cache=config["data"]["cache"],
    script:
        "../scripts/prepare_text.py"


rule prepare_language_model:
    output:
        manifest=f"{DATA}/models/{{model}}/manifest.json",
    log:
        "logs/data/models/{model}.log",
    benchmark:
        f"{config['results']}/benchmark/data/models/{{model}}.tsv"
    retries: 1
    resources:
        mem_mb=memory_of(4000),
        runtime=240,
    params:
        model=language_source,
        sources=config["data"]["sources"],
        mirror=config["data"]["mirror"],
        cache=config["data"]["cache"],
    script:
        "../scripts/prepare_language_model.py"


rule compose_texts:
    input:
        text_manifests,
    output:
        train=f"{LANGUAGE_VICTIM}/texts/train.jsonl",
        defence=f"{LANGUAGE_VICTIM}/texts/defence.jsonl",
        triggered=f"{LANGUAGE_VICTIM}/texts/triggered.jsonl",
        clean=f"{LANGUAGE_VICTIM}/texts/clean.jsonl",
        heldout=f"{LANGUAGE_VICTIM}/texts/heldout.jsonl",
        summary=f"{LANGUAGE_VICTIM}/texts/summary.json",
    log:
        log_of(LANGUAGE_VICTIM, "texts"),
    benchmark:
        benchmark_of(LANGUAGE_VICTIM, "texts")
    wildcard_constraints:
        dataset=only(LANGUAGE_TASKS),
    resources:
        mem_mb=memory_of(1000),
        runtime=10,
    params:
        spec=compose_spec,
        data=text_folders,
        plugins=config["plugins"],
        code=language_code("compose_texts.py"),
    script:
        "../scripts/compose_texts.py"


rule train_language_victim:
    input:
        text_manifests,
        base=base_manifest,
        texts=[f"{LANGUAGE_VICTIM}/texts/{part}" for part in TEXT_FILES.values()],
    output:
        model=directory(f"{LANGUAGE_VICTIM}/model"),
        answers=directory(f"{LANGUAGE_VICTIM}/answers"),
        history=f"{LANGUAGE_VICTIM}/history.csv",
        layers=f"{LANGUAGE_VICTIM}/layers.csv",
        metrics=f"{LANGUAGE_VICTIM}/metrics.json",
    log:
        log_of(LANGUAGE_VICTIM, "victim"),
    benchmark:
        benchmark_of(LANGUAGE_VICTIM, "language_victim")
    wildcard_constraints:
        dataset=only(LANGUAGE_TASKS),
    retries: 1
    threads: CHAIN_THREADS
    resources:
        gpu=GPU,
        vram_mb=language_vram,
        mem_mb=language_memory,
        runtime=runtime_of({"smoke": 5, "demo": 20, "bench": 60, "paper": 480}),
    params:
        spec=language_spec,
        base=base_folder,
        data=text_folders,
        texts=composed,
        device=config["device"],
        code=code_digest(SCRIPTS / "train_language_victim.py"),
    script:
        "../scripts/train_language_victim.py"


rule purify_language:
    input:
        text_manifests,
        base=base_manifest,
        texts=[f"{LANGUAGE_VICTIM}/texts/{part}" for part in TEXT_FILES.values()],
        victim=f"{LANGUAGE_VICTIM}/model",
        before=f"{LANGUAGE_VICTIM}/metrics.json",
        reference=reference_model,
    output:
        model=directory(f"{LANGUAGE_PURIFIED}/model"),
        answers=directory(f"{LANGUAGE_PURIFIED}/answers"),
        history=f"{LANGUAGE_PURIFIED}/history.csv",
        layers=f"{LANGUAGE_PURIFIED}/layers.csv",
        metrics=f"{LANGUAGE_PURIFIED}/metrics.json",
    log:
        log_of(LANGUAGE_PURIFIED, "purify"),
    benchmark:
        benchmark_of(LANGUAGE_PURIFIED, "language_purify")
    wildcard_constraints:
        dataset=only(LANGUAGE_TASKS),
    retries: 1
    threads: CHAIN_THREADS
    resources:
        gpu=GPU,
        vram_mb=language_vram,
        mem_mb=language_memory,
        runtime=runtime_of({"smoke": 5, "demo": 20, "bench": 60, "paper": 480}),
    params:
        spec=language_spec,
        defence=language_defence,
        base=base_folder,
        data=text_folders,
        texts=composed,
        device=config["device"],
        plugins=config["plugins"],
        code=language_code("purify_language.py"),
    script:
        "../scripts/purify_language.py"


rule report_language:
    input:
        cells=f"{RESULTS}/cells.parquet",
        metrics=lambda wildcards: cell_files(paper=wildcards.paper),
        reported=lambda wildcards: sorted(str(path) for path in GRID.file(wildcards.paper, "reported").glob("*.csv")),
    output:
        claims=f"{LANGUAGE_PAPER}/claims.csv",
        tables=directory(f"{LANGUAGE_PAPER}/tables"),
        figures=directory(f"{LANGUAGE_PAPER}/figures"),
    log:
        log_of(LANGUAGE_PAPER, "report_language"),
    benchmark:
        benchmark_of(LANGUAGE_PAPER, "report_language")
    wildcard_constraints:
        paper=only(GRID.papers_of("language")),
    params:
        scale=config["scale"],
        asked=lambda wildcards: language_report(wildcards.paper),
        code=code_digest(SCRIPTS / "report_language.py"),
    script:
        "../scripts/report_language.py"
