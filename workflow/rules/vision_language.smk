# Vision-language models:
# data -> base model (where it is built here) -> poisoned set, triggered test -> victim -> attention -> filters -> refit


rule build_model:
    """A small model built and pretrained here, in place of a published one."""
    input:
        manifest=ancient(rules.prepare_vision_language.output.manifest),
    output:
        model=directory(f"{BASE}/model"),
        history=f"{BASE}/history.csv",
        record=f"{BASE}/base.json",
    log:
        PATHS.log(BASE, "build"),
    benchmark:
        PATHS.benchmark(BASE, "build")
    resources:
        **training(24000, 4000, demo=15, bench=60, paper=240),
    params:
        data=vision_language_content,
        spec=of_path(VISION_LANGUAGE.base),
        code=code("build_model.py"),
    script:
        "../scripts/build_model.py"


rule poison_samples:
    """A poisoned training set; without a rate, a triggered test set."""
    input:
        manifest=ancient(rules.prepare_vision_language.output.manifest),
    output:
        manifest=f"{POISONED}/manifest.json",
        record=f"{POISONED}/poison.json",
    log:
        PATHS.log(POISONED, "poison"),
    benchmark:
        PATHS.benchmark(POISONED, "poison")
    resources:
        mem_mb=memory_of(2000),
        runtime=30,
    params:
        data=vision_language_content,
        spec=of_path(VISION_LANGUAGE.poison),
        code=code("poison_samples.py", VISION_LANGUAGE, "attack"),
    script:
        "../scripts/poison_samples.py"


use rule poison_samples as trigger_samples with:
    output:
        manifest=f"{TRIGGERED}/manifest.json",
        record=f"{TRIGGERED}/poison.json",
    log:
        PATHS.log(TRIGGERED, "trigger"),
    benchmark:
        PATHS.benchmark(TRIGGERED, "trigger")


rule train_vision_language_victim:
    """A model fine-tuned on a poisoned set, and measured."""
    input:
        data=ancient(rules.prepare_vision_language.output.manifest),
        poisoned=rules.poison_samples.output.manifest,
        triggered=rules.trigger_samples.output.manifest,
        base=base_model,
    output:
        model=kept(directory(f"{POISONED_MODEL}/model")),
        history=f"{POISONED_MODEL}/history.csv",
        clean=f"{POISONED_MODEL}/answers_clean.parquet",
        triggered=f"{POISONED_MODEL}/answers_triggered.parquet",
        metrics=f"{POISONED_MODEL}/metrics.json",
    log:
        PATHS.log(POISONED_MODEL, "victim"),
    benchmark:
        PATHS.benchmark(POISONED_MODEL, "victim")
    retries: 1
    resources:
        **training(40000, 4000, demo=15, bench=60, paper=720),
    params:
        data=vision_language_content,
        spec=of_path(VISION_LANGUAGE.victim),
        code=code("train_vision_language_victim.py"),
    script:
        "../scripts/train_vision_language_victim.py"


rule read_attention:
    """Attention entropies of a victim's training samples."""
    input:
        data=ancient(rules.prepare_vision_language.output.manifest),
        poisoned=rules.poison_samples.output.manifest,
        triggered=rules.trigger_samples.output.manifest,
        victim=rules.train_vision_language_victim.output.model,
        before=rules.train_vision_language_victim.output.metrics,
    output:
        entropies=f"{FILTERED}/entropies.parquet",
        maps=f"{FILTERED}/maps.npz",
        record=f"{FILTERED}/attention.json",
    log:
        PATHS.log(FILTERED, "attention"),
    benchmark:
        PATHS.benchmark(FILTERED, "attention")
    retries: 1
    resources:
        **training(40000, 4000, demo=15, bench=60, paper=240),
    params:
        data=vision_language_content,
        spec=of_path(VISION_LANGUAGE.victim),
        code=code("read_attention.py"),
    script:
        "../scripts/read_attention.py"


rule measure_filters:
    """What every filter removes, and how well that is the poison."""
    input:
        entropies=rules.read_attention.output.entropies,
        attention=rules.read_attention.output.record,
        poisoned=rules.poison_samples.output.manifest,
    output:
        flags=[f"{FILTERED}/flags/{name}.json" for name in VISION_LANGUAGE.filters()],
        record=f"{FILTERED}/filters.json",
        metrics=f"{FILTERED}/metrics.json",
    log:
        PATHS.log(FILTERED, "filters"),
    benchmark:
        PATHS.benchmark(FILTERED, "filters")
    resources:
        mem_mb=memory_of(2000),
        runtime=30,
    params:
        spec=of_path(VISION_LANGUAGE.victim),
        asked={"filters": VISION_LANGUAGE.filters(), "taus": VISION_LANGUAGE.taus()},
        code=code_digest(
            SCRIPTS / "measure_filters.py", *(VISION_LANGUAGE.code("defence", name) for name in VISION_LANGUAGE.filters())
        ),
    script:
        "../scripts/measure_filters.py"


rule refit:
    """A model fitted again on what a filter left."""
    input:
        data=ancient(rules.prepare_vision_language.output.manifest),
        poisoned=rules.poison_samples.output.manifest,
        triggered=rules.trigger_samples.output.manifest,
        base=base_model,
        victim=rules.train_vision_language_victim.output.model,
        before=rules.train_vision_language_victim.output.metrics,
        # one job decides for all filters: its date says nothing of this one, whose settings and code are params here
        flags=ancient(flags_of_defence),
    output:
        history=f"{CLEANED}/history.csv",
        clean=f"{CLEANED}/answers_clean.parquet",
        triggered=f"{CLEANED}/answers_triggered.parquet",
        metrics=f"{CLEANED}/metrics.json",
    log:
        PATHS.log(CLEANED, "refit"),
    benchmark:
        PATHS.benchmark(CLEANED, "refit")
    wildcard_constraints:
        defence=only(VISION_LANGUAGE.of_kind("filter")),
    retries: 1
    resources:
        **training(40000, 4000, demo=15, bench=60, paper=720),
    params:
        data=vision_language_content,
        spec=of_path(VISION_LANGUAGE.victim),
        defence=of_path(VISION_LANGUAGE.defence),
        code=lambda wildcards: [
            code(script, VISION_LANGUAGE, "defence")(wildcards) for script in ("refit.py", "measure_filters.py")
        ],
    script:
        "../scripts/refit.py"


rule purify_pictures:
    """A victim asked about purified test pictures."""
    input:
        data=ancient(rules.prepare_vision_language.output.manifest),
        triggered=rules.trigger_samples.output.manifest,
        victim=rules.train_vision_language_victim.output.model,
        before=rules.train_vision_language_victim.output.metrics,
    output:
        history=f"{CLEANED}/history.csv",
        clean=f"{CLEANED}/answers_clean.parquet",
        triggered=f"{CLEANED}/answers_triggered.parquet",
        metrics=f"{CLEANED}/metrics.json",
    log:
        PATHS.log(CLEANED, "pictures"),
    benchmark:
        PATHS.benchmark(CLEANED, "pictures")
    wildcard_constraints:
        defence=only(VISION_LANGUAGE.of_kind("pictures")),
    retries: 1
    resources:
        **training(40000, 4000, demo=15, bench=60, paper=720),
    params:
        data=vision_language_content,
        spec=of_path(VISION_LANGUAGE.victim),
        defence=of_path(VISION_LANGUAGE.defence),
        code=code("purify_pictures.py", VISION_LANGUAGE, "defence"),
    script:
        "../scripts/purify_pictures.py"
