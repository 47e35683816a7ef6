# Image classifiers: data -> trigger (where an attack needs one beforehand) -> poison -> victim -> purified


rule prepare_trigger:
    """What a trigger is made of, where an attack must compute or train it first."""
    input:
        ancient(image_files),
        model=clean_twin,
    output:
        trigger=f"{TRIGGER}/trigger.npz",
    log:
        PATHS.log(TRIGGER, "trigger"),
    benchmark:
        PATHS.benchmark(TRIGGER, "trigger")
    priority: FIRST
    resources:
        **training(4000, 4000, demo=60, desk=60, bench=60, paper=240),
    params:
        spec=of_path(IMAGES.trigger),
        data=image_content,
        code=code("prepare_trigger.py", IMAGES, "attack", "model"),
    script:
        "../scripts/prepare_trigger.py"


rule poison:
    """Which images of a victim's training set are poisoned, and what they become."""
    input:
        ancient(image_files),
        trigger=prepared_trigger,
    output:
        record=f"{VICTIM}/poison.npz",
    log:
        PATHS.log(VICTIM, "poison"),
    benchmark:
        PATHS.benchmark(VICTIM, "poison")
    priority: FIRST
    resources:
        mem_mb=memory_of(2000),
        runtime=30,
    params:
        spec=of_path(IMAGES.victim),
        data=image_content,
        code=code("poison.py", IMAGES, "attack"),
    script:
        "../scripts/poison.py"


rule train_victim:
    """A classifier trained on poisoned images, and measured."""
    input:
        ancient(image_files),
        record=rules.poison.output.record,
        trigger=prepared_trigger,
    output:
        model=f"{VICTIM}/model.safetensors",
        trigger=f"{VICTIM}/trigger.npz",
        history=f"{VICTIM}/history.csv",
        metrics=f"{VICTIM}/metrics.json",
    log:
        PATHS.log(VICTIM, "victim"),
    benchmark:
        PATHS.benchmark(VICTIM, "victim")
    priority: FIRST
    retries: 1
    resources:
        **training(6000, 4000, demo=60, desk=60, bench=60, paper=720),
    params:
        spec=of_path(IMAGES.victim),
        data=image_content,
        code=code("train_victim.py", IMAGES, "attack", "model"),
    script:
        "../scripts/train_victim.py"


rule purify:
    """What a defence makes of a victim, measured on the same images."""
    input:
        ancient(image_files),
        victim=rules.train_victim.output.model,
        trigger=rules.train_victim.output.trigger,
        before=rules.train_victim.output.metrics,
    output:
        model=[f"{PURIFIED}/model.safetensors"],
        history=[f"{PURIFIED}/history.csv"],
        metrics=[f"{PURIFIED}/metrics.json"],
    log:
        PATHS.log(PURIFIED, "purify"),
    benchmark:
        PATHS.benchmark(PURIFIED, "purify")
    retries: 1
    resources:
        **training(6000, 4000, demo=60, desk=60, bench=60, paper=240),
    params:
        spec=of_path(IMAGES.victim),
        defences=lambda wildcards: [of_path(IMAGES.defence)(wildcards)],
        data=image_content,
        code=lambda wildcards: [code("purify.py", IMAGES, "attack", "model", "defence")(wildcards)],
    script:
        "../scripts/purify.py"


# where the scale says `jobs: victim`, one job does all defences of a victim, see docs/extending.md. These rules have no
# wildcards, so Snakemake prefers them. `gather_cells` takes their outputs as files that know their rule: to look for the
# rule of each of 18,000 files takes half a minute. history.csv is written beside the model and not declared: every declared file
# costs time to plan, and one figure alone reads it. A store keeps what is declared, and nothing else.
BLOCK_METRICS, BLOCK_LOGS = {}, {}

for block in GRID.blocks():
    names = (block[0][key] for key in ("paper", "dataset", "model", "recipe", "attack", "rate", "seed"))
    block_name = re.sub(r"\W", "_", "_".join(["purify", *names]))

    rule:
        """All defences of one victim."""
        name:
            block_name
        input:
            ancient(image_files(block[0])),
            victim=f"{VICTIM}/model.safetensors".format(**block[0]),
            trigger=f"{VICTIM}/trigger.npz".format(**block[0]),
            before=f"{VICTIM}/metrics.json".format(**block[0]),
        output:
            metrics=[f"{PATHS.cell(cell)}/metrics.json" for cell in block],
            model=[f"{PATHS.cell(cell)}/model.safetensors" for cell in block],
            history=brought([f"{PATHS.cell(cell)}/history.csv" for cell in block]),
        log:
            PATHS.log(f"{RESULTS}/images/blocks/{block_name}", "purify"),
        benchmark:
            PATHS.benchmark(f"{RESULTS}/images/blocks/{block_name}", "purify")
        priority: len(block)
        retries: 1
        resources:
            **training(6000, 4000, demo=120, desk=480, bench=240, paper=1440),
        params:
            spec=IMAGES.victim(block[0]),
            defences=[IMAGES.defence(cell) for cell in block],
            data=lambda wildcards, cell=block[0]: image_content(cell),
            code=[code("purify.py", IMAGES, "attack", "model", "defence")(cell) for cell in block],
        script:
            "../scripts/purify.py"

    BLOCK_METRICS |= {str(file): file for file in workflow.get_rule(block_name).output.metrics}
    BLOCK_LOGS |= dict.fromkeys(map(PATHS.cell, block), PATHS.log(f"{RESULTS}/images/blocks/{block_name}", "purify"))
