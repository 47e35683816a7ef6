# Everything a machine without network needs, in parts of a given largest size: `snakemake bundle`, see docs/offline.md

from cupel import bundle as bundles

BUNDLE = f"{config['bundle']['folder']}/{config['scale']}"
WHEELS = f"{config['bundle']['folder']}/wheels"

# other files a scale needs, by their path in the bundle: pictures and patterns of attacks that lie in data.mirror
USED_ATTACKS = {(cell["attack"], cell["dataset"]) for cell in GRID.cells("victim")}
EXTRA = bundles.mirror_files(
    [attack_spec(Cell(attack=attack, dataset=dataset))["parameters"] for attack, dataset in USED_ATTACKS],
    config["data"]["mirror"],
)
CARRIED_DATA = {**bundles.data_files(used_datasets(), DATA), **EXTRA}
# with `bundle.with: [victims]` the victims that are there; none is trained for it, so they are no input
CARRIED_VICTIMS = bundles.victim_files(config["results"], config["scale"]) if "victims" in config["bundle"]["with"] else {}


rule bundle:
    input:
        f"{BUNDLE}/manifest.json",


rule download_wheels:
    input:
        pyproject=f"{workflow.basedir}/pyproject.toml",
        constraints=f"{workflow.basedir}/envs/constraints.txt",
    output:
        wheels=directory(WHEELS),
    log:
        "logs/bundle/wheels.log",
    benchmark:
        f"{config['results']}/benchmark/bundle/wheels.tsv"
    params:
        settings={key: config["bundle"][key] for key in ("python", "platforms", "skip")},
    script:
        "../scripts/bundle.py"


rule make_bundle:
    input:
        list(CARRIED_DATA.values()),
        plugins=config["plugins"],
        wheels=WHEELS if config["bundle"]["wheels"] else [],
    output:
        manifest=f"{BUNDLE}/manifest.json",
        unpack=f"{BUNDLE}/unpack.py",
    log:
        f"logs/bundle/{config['scale']}.log",
    benchmark:
        f"{config['results']}/benchmark/bundle/{config['scale']}.tsv"
    params:
        root=workflow.basedir,
        scale=config["scale"],
        config=bundles.carried_config(config, bool(EXTRA)),
        settings=config["bundle"],
        data=CARRIED_DATA,
        victims=CARRIED_VICTIMS,
        made=lambda wildcards: [os.stat(path).st_mtime_ns for path in CARRIED_VICTIMS.values()],
        sources=lambda wildcards: bundles.source_digest(workflow.basedir),
    script:
        "../scripts/bundle.py"
