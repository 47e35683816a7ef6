# What the workflow does not keep of IMS: masks, selections and perturbations, from one run made again


rule ims_inside:
    input:
        dataset_files,
        victim=f"{VICTIM}/model.safetensors",
        trigger=f"{VICTIM}/trigger.npz",
        metrics=f"{PURIFIED}/metrics.json",
    output:
        masks=f"{PURIFIED}/masks.png",
        gallery=f"{PURIFIED}/perturbations.png",
        table=f"{PURIFIED}/stages.csv",
    log:
        log_of(PURIFIED, "inside"),
    benchmark:
        benchmark_of(PURIFIED, "inside")
    wildcard_constraints:
        defence=r"ims(~[a-z0-9]+)?",
    resources:
        gpu=GPU,
        vram_mb=6000,
        mem_mb=memory_of(4000),
        runtime=runtime_of({"smoke": 5, "demo": 15, "bench": 60, "paper": 240}),
    params:
        spec=victim_spec,
        defence=defence_spec,
        data=data_folder,
        device=config["device"],
        plugins=config["plugins"],
        code=code("ims_inside.py", "attack", "model", "defence"),
    script:
        "../scripts/ims_inside.py"
