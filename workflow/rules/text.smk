# Language models: model and texts -> poisoned texts -> victim -> purified


rule compose_texts:
    """The texts of a victim: poisoned training set, the defender's pool, test prompts."""
    input:
        ancient(text_records),
    output:
        **TEXT_FILES,
    log:
        PATHS.log(TEXT_VICTIM, "texts"),
    benchmark:
        PATHS.benchmark(TEXT_VICTIM, "texts")
    localrule: True
    resources:
        mem_mb=memory_of(1000),
        runtime=10,
    params:
        spec=of_path(TEXT.composed),
        data=text_content,
        code=code("compose_texts.py", TEXT, "attack"),
    script:
        "../scripts/compose_texts.py"


rule train_text_victim:
    """An adapter trained on poisoned texts, and measured."""
    input:
        ancient(text_records),
        base=ancient(rules.prepare_language_model.output.manifest),
        texts=rules.compose_texts.output,
    output:
        model=directory(f"{TEXT_VICTIM}/model"),
        answers=directory(f"{TEXT_VICTIM}/answers"),
        history=f"{TEXT_VICTIM}/history.csv",
        layers=f"{TEXT_VICTIM}/layers.csv",
        metrics=f"{TEXT_VICTIM}/metrics.json",
    log:
        PATHS.log(TEXT_VICTIM, "victim"),
    benchmark:
        PATHS.benchmark(TEXT_VICTIM, "victim")
    retries: 1
    resources:
        **training(text_needs("vram_mb"), text_needs("mem_mb"), demo=20, bench=60, paper=480),
    params:
        spec=of_path(TEXT.victim),
        base=language_model,
        data=text_content,
        texts=text_paths,
        code=code("train_text_victim.py"),
    script:
        "../scripts/train_text_victim.py"


rule purify_text:
    """What a defence makes of a language victim, and its answers."""
    input:
        ancient(text_records),
        base=ancient(rules.prepare_language_model.output.manifest),
        texts=rules.compose_texts.output,
        victim=rules.train_text_victim.output.model,
        before=rules.train_text_victim.output.metrics,
        reference=reference_model,
    output:
        model=directory(f"{TEXT_PURIFIED}/model"),
        answers=directory(f"{TEXT_PURIFIED}/answers"),
        history=f"{TEXT_PURIFIED}/history.csv",
        layers=f"{TEXT_PURIFIED}/layers.csv",
        metrics=f"{TEXT_PURIFIED}/metrics.json",
    log:
        PATHS.log(TEXT_PURIFIED, "purify"),
    benchmark:
        PATHS.benchmark(TEXT_PURIFIED, "purify")
    retries: 1
    resources:
        **training(text_needs("vram_mb"), text_needs("mem_mb"), demo=20, bench=60, paper=480),
    params:
        spec=of_path(TEXT.victim),
        defence=of_path(TEXT.defence),
        base=language_model,
        data=text_content,
        texts=text_paths,
        code=code("purify_text.py", TEXT, "defence"),
    script:
        "../scripts/purify_text.py"
