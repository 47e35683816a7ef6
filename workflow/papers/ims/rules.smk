# What a run of IMS looks like inside, drawn from what the defence kept of it

INSIDE = GRID.file("ims", "inside.py")


rule ims_inside:
    """Masks, selections, stages and perturbations of one run of IMS, by path."""
    input:
        ancient(image_files),
        victim=f"{VICTIM}/model.safetensors",
        trigger=f"{VICTIM}/trigger.npz",
        metrics=f"{PURIFIED}/metrics.json",
    output:
        masks=f"{PURIFIED}/masks.svg",
        gallery=f"{PURIFIED}/perturbations.svg",
        tables=[f"{PURIFIED}/masks.csv", f"{PURIFIED}/perturbations.csv"],
    log:
        PATHS.log(PURIFIED, "inside"),
    benchmark:
        PATHS.benchmark(PURIFIED, "inside")
    wildcard_constraints:
        defence=r"ims(~[a-z0-9_]+)?",
    resources:
        **training(6000, 4000, demo=5, bench=15, paper=15),
    params:
        run=of_path(lambda cell: {"spec": IMAGES.victim(cell), "defence": IMAGES.defence(cell), "data": f"{DATA}/images"}),
        code=of_path(
            lambda cell: code_digest(
                *filter(None, [INSIDE, INSIDE.parent / "scripts" / "inside.py", IMAGES.code("attack", cell["attack"])])
            )
        ),
    script:
        "scripts/inside.py"


# for the page: the run on the victim with the highest rate, where the grid has one and report.allow_missing has not to do without. A store
# has not what the defence kept
runs = [
    cell
    for cell in GRID.cells("purified")
    if (cell["paper"], cell["defence"]) == ("ims", "ims")
    and len(present([f"{VICTIM.format(**cell)}/model.safetensors", f"{PATHS.cell(cell)}/metrics.json"])) == 2
    and not STORED
]
texts = {
    "masks": "One run of IMS: forward masks and selections by layer, and its three stages.",
    "perturbations": "Perturbations that IMS synthesises, with the victim's prediction before and after, and the real trigger.",
}
PICTURES["ims"] = [
    {"path": f"{PATHS.cell(cell)}/{name}.svg", "caption": f"{text} {cell['attack']} {100 * float(cell['rate']):g} %."}
    for cell in sorted(runs, key=lambda cell: float(cell["rate"]), reverse=True)[:1]
    for name, text in texts.items()
]
