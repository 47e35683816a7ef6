# Language models: model and texts -> poisoned texts -> victim -> purified

TEXT_VICTIM, TEXT_PURIFIED = (PATHS.stage("text", stage) for stage in ("victim", "purified"))
TEXT_FILES = {part: f"{TEXT_VICTIM}/texts/{part}.jsonl" for part in ("train", "defence", "triggered", "clean", "heldout")}
TEXT_FILES["summary"] = f"{TEXT_VICTIM}/texts/summary.json"


def text_folders(wildcards):
    """Prepared data sets that a cell reads, by name."""
    return {name: f"{DATA}/text/{name}" for name in of_path(TEXT.texts)(wildcards)}


def text_records(wildcards):
    return [f"{folder}/{name}" for folder in text_folders(wildcards).values() for name in ("manifest.json", "records.jsonl")]


def text_needs(what):
    """Megabytes that a model needs, of the device or of memory."""
    usual = {"vram_mb": 8000, "mem_mb": 4000}
    return lambda wildcards: TEXT.find("models", wildcards.model).get(what, usual[what])


def text_paths(wildcards):
    """Texts of a victim by part."""
    return {part: file.format(**wildcards) for part, file in TEXT_FILES.items()}


def reference_model(wildcards):
    """The adapter of the victim that a defence compares with, where it is not the base model."""
    cell = of_path(TEXT.reference)(wildcards)
    return f"{TEXT_VICTIM}/model".format(**cell) if cell else []


rule compose_texts:
    localrule: True
    input:
        text_records,
    output:
        **TEXT_FILES,
    log:
        log_of(TEXT_VICTIM, "texts"),
    benchmark:
        benchmark_of(TEXT_VICTIM, "texts")
    resources:
        mem_mb=memory_of(1000),
        runtime=10,
    params:
        spec=of_path(TEXT.composed),
        data=text_folders,
        code=code("compose_texts.py"),
    script:
        "../scripts/compose_texts.py"


rule train_text_victim:
    input:
        text_records,
        base=f"{DATA}/language_models/{{model}}/manifest.json",
        texts=list(TEXT_FILES.values()),
    output:
        model=directory(f"{TEXT_VICTIM}/model"),
        answers=directory(f"{TEXT_VICTIM}/answers"),
        history=f"{TEXT_VICTIM}/history.csv",
        layers=f"{TEXT_VICTIM}/layers.csv",
        metrics=f"{TEXT_VICTIM}/metrics.json",
    log:
        log_of(TEXT_VICTIM, "victim"),
    benchmark:
        benchmark_of(TEXT_VICTIM, "victim")
    retries: 1
    threads: CHAIN_THREADS
    resources:
        **training(text_needs("vram_mb"), text_needs("mem_mb"), demo=20, bench=60, paper=480),
    params:
        spec=of_path(TEXT.victim),
        base=f"{DATA}/language_models/{{model}}",
        data=text_folders,
        texts=text_paths,
        device=config["device"],
        code=code("train_language_victim.py"),
    script:
        "../scripts/train_language_victim.py"


rule purify_text:
    input:
        text_records,
        base=f"{DATA}/language_models/{{model}}/manifest.json",
        texts=list(TEXT_FILES.values()),
        victim=f"{TEXT_VICTIM}/model",
        before=f"{TEXT_VICTIM}/metrics.json",
        reference=reference_model,
    output:
        model=directory(f"{TEXT_PURIFIED}/model"),
        answers=directory(f"{TEXT_PURIFIED}/answers"),
        history=f"{TEXT_PURIFIED}/history.csv",
        layers=f"{TEXT_PURIFIED}/layers.csv",
        metrics=f"{TEXT_PURIFIED}/metrics.json",
    log:
        log_of(TEXT_PURIFIED, "purify"),
    benchmark:
        benchmark_of(TEXT_PURIFIED, "purify")
    retries: 1
    threads: CHAIN_THREADS
    resources:
        **training(text_needs("vram_mb"), text_needs("mem_mb"), demo=20, bench=60, paper=480),
    params:
        spec=of_path(TEXT.victim),
        defence=of_path(TEXT.defence),
        base=f"{DATA}/language_models/{{model}}",
        data=text_folders,
        texts=text_paths,
        device=config["device"],
        code=code("purify_language.py"),
    script:
        "../scripts/purify_language.py"
