# Everything a machine without network needs, in parts of a given largest size: `snakemake bundle`, see docs/offline.md

from cupel.bundle import source_digest
from cupel.datasets import FILES as DATASET_FILES

BUNDLE = f"{config['bundle']['folder']}/{config['scale']}"
WHEELS = f"{config['bundle']['folder']}/wheels"


def bundle_data():
    return {f"data/{name}/{file}": f"{DATA}/{name}/{file}" for name in used_datasets() for file in DATASET_FILES}


def bundle_extra():
    """Other files the scale needs, by their path in the bundle: pictures and patterns of attacks that lie in data.mirror."""
    mirror = str(config["data"]["mirror"])
    files = {}
    for cell in GRID.cells("victim"):
        for value in attack_spec(Cell(**cell))["parameters"].values():
            if isinstance(value, str) and config["data"]["mirror"] and Path(value).is_relative_to(mirror):
                files[f"mirror/{Path(value).relative_to(mirror).as_posix()}"] = value
    return files


def bundle_victims():
    """With `bundle.with: [victims]` the victims that are there already, and the triggers made for them; none is trained."""
    if "victims" not in config["bundle"]["with"]:
        return {}
    names = ("model.safetensors", "trigger.npz", "metrics.json", "poison.npz", "history.csv")
    folders = [path.parent for path in Path(RESULTS, "victims").rglob("metrics.json")]
    files = [folder / name for folder in folders for name in names if all((folder / n).is_file() for n in names)]
    files += Path(RESULTS, "triggers").rglob("trigger.npz")
    here = config["results"]
    return {f"results/{path.relative_to(here).as_posix()}": str(path) for path in sorted(files)}


def bundle_config():
    """The configuration of this run, with the folders of the bundle."""
    plugins = [f"plugins/{Path(path).name}" for path in config["plugins"]]
    data = {**config["data"], "folder": "data", "mirror": "mirror" if bundle_extra() else None, "cache": None}
    return {**config, "data": data, "results": "results", "plugins": plugins}


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
        data=list(bundle_data().values()),
        extra=list(bundle_extra().values()),
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
        config=lambda wildcards: bundle_config(),
        settings=config["bundle"],
        data=bundle_data(),
        extra=bundle_extra(),
        victims=lambda wildcards: bundle_victims(),
        made=lambda wildcards: [os.stat(path).st_mtime_ns for path in bundle_victims().values()],
        sources=lambda wildcards: source_digest(workflow.basedir),
    script:
        "../scripts/bundle.py"
