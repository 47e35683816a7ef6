# Configuration, checked before any job, and what the rules of all families share.
import gc
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.utils import validate

from cupel.digest import code_digest
from cupel.experiment import Grid
from cupel.paths import Paths
from cupel.settings import LIBRARY, ConfigError, check_schema, schema, typed

# planning makes millions of objects that stay, and the collector would walk through them again and again
gc.set_threshold(200_000, 50, 1000)


def checked(function):
    """The same function, whose complaints about settings end the run in a sentence before its first job."""

    def call(*arguments, **options):
        try:
            return function(*arguments, **options)
        except ConfigError as error:
            raise WorkflowError(f"The configuration is wrong; nothing was run.\n{error}") from None

    return call


config.update(typed(config, schema("config")))
checked(check_schema)(config, schema("config"), "config.yaml")
validate(config, "../schemas/config.schema.yaml")  # fills in the defaults
ASKED = {"seeds": config["seeds"], "plugins": config["plugins"], "mirror": config["data"]["mirror"]}
GRID = checked(Grid)(config["papers"], config["scale"], jobs=config["jobs"], **ASKED)
ZOO = checked(Grid)(["zoo"], config["scale"], **ASKED)
IMAGES, ROBUST, TEXT, VISION_LANGUAGE = (GRID.families[name] for name in ("images", "robust", "text", "vision_language"))

PATHS = Paths(config["results"], config["scale"], config["data"]["folder"])
DATA, RESULTS = PATHS.data, PATHS.root
SCRIPTS = Path(workflow.basedir) / "workflow" / "scripts"
TEMPLATES = sorted((LIBRARY / "reporting").glob("*.j2"))
#: where raw files come from, for rules that prepare data
SOURCES = {key: config["data"][key] for key in ("sources", "mirror", "cache")}


wildcard_constraints:
    dataset=r"[a-z0-9_]+",
    model=r"[a-z0-9_]+",
    recipe=r"[a-z0-9_]+",
    attack=r"[a-z0-9_~]+",
    rate=r"[0-9.e-]+",
    seed=r"[0-9]+",
    defence=r"[a-z0-9_~]+",
    evaluation=r"[a-z0-9_]+",
    budget=r"[a-z0-9_]+",
    paper=r"[a-z0-9_]+",


RUN_LOCK = []


def hold_lock():
    """One run at a time in a folder.

    Snakemake's own lock files outlive a killed run and would ask the user to unlock; this lock is the kernel's and goes
    with the process (profiles/default says `nolock: true`).
    """
    if sys.platform == "win32":
        return
    import fcntl

    os.makedirs(".snakemake", exist_ok=True)
    RUN_LOCK.append(open(".snakemake/cupel.lock", "w"))
    try:
        fcntl.flock(RUN_LOCK[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkflowError(
            f"Another run is active in {os.getcwd()}: wait for it, or use another folder (--directory)."
        ) from None
    except OSError as error:  # some network file systems know no locks
        logger.warning(f"no lock could be taken ({error}): do not start a second run in {os.getcwd()}")


def of_path(function):
    """A parameter function: what the grid says of the names in a path."""

    def parameter(wildcards):
        return checked(function)(dict(wildcards.items()))

    return parameter


def code(script, family=None, *kinds):
    """Hash of what a job's code means: its script, and the attack or defence that its path names."""

    def digest(wildcards):
        named = (family.code(kind, wildcards[kind]) for kind in kinds)
        return code_digest(SCRIPTS / script, *filter(None, named))

    return digest


def log_of(pattern, name):
    return PATHS.log(pattern, name)


def benchmark_of(pattern, name):
    return PATHS.benchmark(pattern, name)


def only(names):
    """A wildcard constraint: one of these names, or none at all."""
    return "|".join(map(re.escape, names)) or "none"


def present(files):
    """The files; with report.allow_missing only those that exist."""
    return [file for file in files if not config["report"]["allow_missing"] or os.path.exists(file)]


def cell_files(paper=None, stage=None, name="metrics.json", family=None):
    """A file of every cell, by default its record."""
    files = [f"{PATHS.cell(cell)}/{name}" for cell in GRID.cells(stage, paper, family)]
    return present(dict.fromkeys(files))


def manifests(names):
    """Prepared data, by its folder below that of all data, to its manifest."""
    return {name: f"{DATA}/{name}/manifest.json" for name in names}


# what jobs that train ask a cluster for
GPU = 0 if config["device"] == "cpu" else 1

# of jobs that much waits for: victims, before the defences of those that are there
FIRST = 100

# jobs that a whole chain waits for cannot fill two cores side by side; at demo scale each of them takes both
CHAIN_THREADS = 2 if config["scale"] == "demo" else 1


def memory_of(megabytes):
    """Memory of a job, raised by half with every attempt."""

    def size(wildcards, attempt):
        known = megabytes(wildcards) if callable(megabytes) else megabytes
        return int(known * 1.5 ** (attempt - 1))

    return size


def training(vram, memory, **minutes):
    """Resources of a job that trains: MB on the device and in memory, and minutes at each scale, doubled with every attempt."""

    def runtime(wildcards, attempt):
        return {"smoke": 5, **minutes}[config["scale"]] * 2 ** (attempt - 1)

    return {"gpu": GPU, "vram_mb": vram, "mem_mb": memory_of(memory), "runtime": runtime}


def history_files(wildcards):
    return [file.replace("metrics.json", "history.csv") for file in cell_files(paper=wildcards.paper, stage="victim")]


def labels_of(paper):
    """Names for people of the defences in a paper's grid, in the order of its experiment.yaml."""
    used = dict.fromkeys(cell["defence"] for cell in GRID.cells("purified", paper))
    known = {name: entry.get("label", name) for name, entry in GRID.entries["defences"].items()}
    order = [name for name in known if name in used] + [name for name in used if name not in known]
    return {name: known.get(name, name) for name in order}


def kinds_of(paper):
    """What sort of defence each is, for the comparison of pruning with tuning."""
    return {name: GRID.entries["defences"].get(name, {}).get("kind", "") for name in labels_of(paper)}


def reach_of(paper):
    """How far IMS's inner steps can move a pixel: the step times their number."""
    reach = {}
    for cell in GRID.cells("purified", paper):
        settings = GRID.defence(cell["defence"], cell["dataset"])
        if settings["function"] == "ims":
            parameters = {"lr_perturb": 0.001, "steps_perturb": 20, **settings["hyperparameters"]}
            reach[cell["defence"]] = parameters["lr_perturb"] * parameters["steps_perturb"]
    return reach


def claims_of(paper):
    file = GRID.file(paper, "claims.yaml")
    content = read_yaml(file)
    try:
        check_schema(content, "claims", file)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None
    return content["claims"]


def poisoned_cells(stage, paper=None):
    return [cell for cell in GRID.cells(stage, paper) if cell["attack"] != "clean"]


def feature_cells(paper):
    """Rows of the feature figure: per attack the victim at the highest and the lowest rate, FT and FST at the lowest."""
    victims = poisoned_cells("victim", paper)
    first = next(iter(victims))
    same = [c for c in victims if all(c[k] == first[k] for k in ("dataset", "model", "recipe", "seed"))]
    panels = []
    for attack in dict.fromkeys(c["attack"] for c in same if "~" not in c["attack"]):
        rates = sorted((c for c in same if c["attack"] == attack), key=lambda c: float(c["rate"]))
        for cell in dict.fromkeys((len(rates) - 1, 0)):
            panels.append((attack, f"victim, {100 * float(rates[cell]['rate']):g} %", rates[cell]))
        for cell in GRID.cells("purified", paper):
            if cell["defence"] in ("ft", paper) and all(
                cell[k] == rates[0][k] for k in rates[0] if k not in ("stage", "paper")
            ):
                panels.append((attack, f"{cell['defence'].upper()}, {100 * float(cell['rate']):g} %", cell))
    return panels


def feature_panels(paper):
    return [
        {
            "row": attack,
            "title": title,
            "model": f"{cell_folder(cell)}/model.safetensors",
            "trigger": f"{VICTIM.format(**cell)}/trigger.npz",
            "attack": attack_spec(Cell(**cell)),
        }
        for attack, title, cell in feature_cells(paper)
    ]


def feature_inputs(paper):
    return [panel[key] for panel in feature_panels(paper) for key in ("model", "trigger")]


def inside_pictures(paper):
    """Pictures of one run of IMS, on the victim with the highest rate, where the paper's grid has one."""
    cells = [cell for cell in GRID.cells("purified", paper) if cell["defence"] == "ims"] if paper == "ims" else []
    if not cells:
        return []
    folder = cell_folder(max(cells, key=lambda cell: float(cell["rate"])))
    return [f"{folder}/masks.png", f"{folder}/perturbations.png"]


def feature_setting(paper):
    cell = feature_cells(paper)[0][2]
    recipe = GRID.recipe(cell["recipe"], cell["dataset"])
    return {"dataset": cell["dataset"], "target": recipe.get("target", 0), "test_size": recipe.get("test_size")}


def trigger_folders(dataset, grid=GRID):
    """One victim of every attack on a data set, whose trigger the contact sheet shows."""
    cells = [cell for cell in grid.cells("victim") if cell["attack"] != "clean" and cell["dataset"] == dataset]
    return {cell["attack"]: VICTIM.format(**cell) for cell in reversed(cells)}


def sheet_attacks(dataset, grid=GRID):
    return {name: attack_spec(Cell(attack=name, dataset=dataset)) for name in trigger_folders(dataset, grid)}


def used_seeds():
    return sorted({int(cell["seed"]) for cell in [*GRID.cells(), *family_cells()]})


def used_manifests():
    names = {*used_datasets(), *(name for names in FAMILY_DATA.values() for name in names)}
    return {name: f"{DATA}/{name}/manifest.json" for name in sorted(names)}


def page_pictures(paper):
    """Pictures of a paper that other rules draw, with their captions, in the order of the page."""
    if GRID.family(paper) != "image":
        return []
    texts = (
        "Penultimate features (t-SNE): clean test images by class, triggered ones as crosses. The numbers: shares of a "
        "triggered image's ten nearest clean images that are of the target class, and of its true class.",
        "One run of IMS: forward masks and selections by layer, and its three stages.",
        "Perturbations that IMS synthesises, with the victim's prediction before and after, and the real trigger.",
    )
    paths = [f"{RESULTS}/papers/{paper}/features.png", *inside_pictures(paper)]
    return [{"path": path, "caption": text} for path, text in zip(paths, texts)]


def paper_headers():
    return [
        {
            "key": paper,
            "title": GRID.experiments[paper]["title"],
            "reference": GRID.experiments[paper].get("reference", ""),
            "note": GRID.experiments[paper]["scales"].get(config["scale"], {}).get("note", ""),
            "folder": f"{RESULTS}/papers/{paper}",
            "pictures": page_pictures(paper),
        }
        for paper in GRID.papers
    ]
