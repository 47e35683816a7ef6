# dataset -> trigger (where an attack needs one beforehand) -> poison -> victim -> purified


rule prepare_trigger:
    input:
        dataset_files,
        model=trigger_inputs,
    output:
        trigger=f"{TRIGGER}/trigger.npz",
    log:
        log_of(TRIGGER, "trigger"),
    benchmark:
        benchmark_of(TRIGGER, "trigger")
    priority: FIRST
    resources:
        gpu=GPU,
        vram_mb=4000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 10, "bench": 60, "paper": 240}),
    params:
        spec=trigger_spec,
        data=data_folder,
        device=config["device"],
        plugins=config["plugins"],
        code=code("prepare_trigger.py", "attack", "model"),
    script:
        "../scripts/prepare_trigger.py"


rule poison:
    input:
        dataset_files,
        trigger=prepared_trigger,
    output:
        record=f"{VICTIM}/poison.npz",
    log:
        log_of(VICTIM, "poison"),
    benchmark:
        benchmark_of(VICTIM, "poison")
    priority: FIRST
    resources:
        mem_mb=memory_of(2000),
        runtime=30,
    params:
        spec=victim_spec,
        data=data_folder,
        plugins=config["plugins"],
        code=code("poison.py", "attack"),
    script:
        "../scripts/poison.py"


rule train_victim:
    input:
        dataset_files,
        record=f"{VICTIM}/poison.npz",
        trigger=prepared_trigger,
    output:
        model=f"{VICTIM}/model.safetensors",
        trigger=f"{VICTIM}/trigger.npz",
        history=f"{VICTIM}/history.csv",
        metrics=f"{VICTIM}/metrics.json",
    log:
        log_of(VICTIM, "victim"),
    benchmark:
        benchmark_of(VICTIM, "victim")
    priority: FIRST
    retries: 1
    resources:
        gpu=GPU,
        vram_mb=6000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 60, "paper": 720}),
    params:
        spec=victim_spec,
        data=data_folder,
        device=config["device"],
        plugins=config["plugins"],
        code=code("train_victim.py", "attack", "model"),
    script:
        "../scripts/train_victim.py"


rule purify:
    input:
        dataset_files,
        victim=f"{VICTIM}/model.safetensors",
        trigger=f"{VICTIM}/trigger.npz",
        before=f"{VICTIM}/metrics.json",
    output:
        model=[f"{PURIFIED}/model.safetensors"],
        history=[f"{PURIFIED}/history.csv"],
        metrics=[f"{PURIFIED}/metrics.json"],
    log:
        log_of(PURIFIED, "purify"),
    benchmark:
        benchmark_of(PURIFIED, "purify")
    retries: 1
    resources:
        gpu=GPU,
        vram_mb=6000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 60, "paper": 240}),
    params:
        spec=victim_spec,
        defences=lambda wildcards: [defence_spec(wildcards)],
        data=data_folder,
        device=config["device"],
        plugins=config["plugins"],
        code=lambda wildcards: [code("purify.py", "attack", "model", "defence")(wildcards)],
    script:
        "../scripts/purify.py"


# where the scale says `jobs: victim`, one job does all defences of a victim, see docs/extending.md. These rules have no
# wildcards, so Snakemake prefers them. `gather_cells` takes their outputs as files that know their rule: to look for the
# rule of each of 18,000 files takes half a minute. history.csv is written beside the model and not declared: every declared file
# costs time to plan, and one figure alone reads it.
BLOCK_METRICS = {}

for block in GRID.blocks().values():

    rule:
        name:
            block_name(block[0])
        input:
            dataset_files(Cell(**block[0])),
            victim=f"{VICTIM}/model.safetensors".format(**block[0]),
            trigger=f"{VICTIM}/trigger.npz".format(**block[0]),
            before=f"{VICTIM}/metrics.json".format(**block[0]),
        output:
            metrics=[f"{cell_folder(cell)}/metrics.json" for cell in block],
            model=[f"{cell_folder(cell)}/model.safetensors" for cell in block],
        log:
            log_of(f"{RESULTS}/purified/{block[0]['paper']}/{block_name(block[0])}", "purify"),
        benchmark:
            benchmark_of(f"{RESULTS}/purified/{block[0]['paper']}/{block_name(block[0])}", "purify")
        priority: len(block)
        retries: 1
        resources:
            gpu=GPU,
            vram_mb=6000,
            mem_mb=memory_of(4000),
            runtime=runtime_of({"smoke": 5, "demo": 30, "bench": 240, "paper": 1440}),
        params:
            spec=victim_spec(Cell(**block[0])),
            defences=[defence_spec(Cell(**cell)) for cell in block],
            data=data_folder,
            device=config["device"],
            plugins=config["plugins"],
            code=[code("purify.py", "attack", "model", "defence")(Cell(**cell)) for cell in block],
        script:
            "../scripts/purify.py"

    BLOCK_METRICS |= {str(file): file for file in workflow.get_rule(block_name(block[0])).output.metrics}
