# Configuration, checked before any job, and the input and parameter functions of the rules.
import functools
import gc
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace as Cell

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.utils import validate

from cupel.digest import code_digest
from cupel.images.datasets import NAMES as DATASETS
from cupel.grid import LIBRARY, SCHEMAS, ConfigError, Grid, check_schema, read_yaml, typed
from cupel.registry import unknown

# planning makes millions of objects that stay, and the collector would walk through them again and again
gc.set_threshold(200_000, 50, 1000)

try:
    config.update(typed(config, read_yaml(SCHEMAS / "config.schema.yaml")))
    check_schema(config, "config", "config.yaml")
    validate(config, "../schemas/config.schema.yaml")  # fills in the defaults
    GRID = Grid(config["papers"], config["scale"], config["seeds"], config["plugins"], config["jobs"])
    ZOO = Grid(["zoo"], config["scale"], config["seeds"], config["plugins"])
    for cell in [*GRID.cells(), *ZOO.cells()]:
        if cell["dataset"] not in DATASETS:
            raise ConfigError(f"experiment.yaml of {cell['paper']}: datasets: {unknown('dataset', cell['dataset'], DATASETS)}")
except ConfigError as error:
    raise WorkflowError(f"The configuration is wrong; nothing was run.\n{error}") from None

DATA = config["data"]["folder"]
RESULTS = f"{config['results']}/{config['scale']}"
SCRIPTS = Path(workflow.basedir) / "workflow" / "scripts"
TEMPLATES = tuple(sorted((LIBRARY / "reporting").glob("*.j2")))

VICTIM = f"{RESULTS}/victims/{{dataset}}/{{model}}/{{recipe}}/{{attack}}@{{rate}}/seed{{seed}}"
PURIFIED = f"{RESULTS}/purified/{{dataset}}/{{model}}/{{recipe}}/{{attack}}@{{rate}}/seed{{seed}}/{{defence}}@{{budget}}"
TRIGGER = f"{RESULTS}/triggers/{{dataset}}/{{model}}/{{recipe}}/{{attack}}/seed{{seed}}"
FOLDERS = {"victim": VICTIM, "purified": PURIFIED}

# papers of other families put their cells here: dicts with paper, stage, what names the cell, and folder
FAMILY_CELLS = {}
# and the names of their data sets, whose manifests belong to the provenance
FAMILY_DATA = {}


wildcard_constraints:
    dataset=r"[a-z0-9_]+",
    model=r"[a-z0-9_]+",
    recipe=r"[a-z0-9_]+",
    attack=r"[a-z0-9_~]+",
    rate=r"[0-9.e-]+",
    seed=r"[0-9]+",
    defence=r"[a-z0-9_~]+",
    budget=r"[a-z0-9]+",
    paper=r"[a-z_]+",


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


def checked(function, *arguments):
    """A value computed from settings; a setting that is wrong ends the run before its first job."""
    try:
        return function(*arguments)
    except ConfigError as error:
        raise WorkflowError(f"The configuration is wrong; nothing was run.\n{error}") from None


def data_folder(wildcards):
    return DATA


def used_datasets():
    return sorted({cell["dataset"] for cell in GRID.cells()})


def dataset_files(wildcards):
    return [f"{DATA}/{wildcards.dataset}/{split}_{part}.npy" for split in ("train", "test") for part in ("images", "labels")]


def clean_victim(wildcards):
    """The twin of a victim that was trained on clean data, same recipe and seed."""
    return VICTIM.format(**{**wildcards, "attack": "clean", "rate": "0"})


@functools.cache
def trigger_needs(name):
    """What an attack must be given beforehand: read from its file, nothing is imported."""
    import ast

    function = GRID.attack(name, "")["function"] if name != "clean" else "none"
    file = GRID.code("attack", function)
    if file is None:
        return ""
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "needs":
            return node.value.value
    return ""


def prepared_trigger(wildcards):
    if wildcards.attack == "clean" or not trigger_needs(wildcards.attack):
        return []
    return f"{TRIGGER}/trigger.npz".format(**wildcards)


def trigger_inputs(wildcards):
    if trigger_needs(wildcards.attack) == "clean_model":
        return f"{clean_victim(wildcards)}/model.safetensors"
    return []


def attack_spec(wildcards):
    """Name, function and parameters of an attack; paths that begin with mirror: point into data.mirror."""
    if wildcards.attack == "clean":
        return {"name": "clean", "function": "none", "parameters": {}}
    spec = GRID.attack(wildcards.attack, wildcards.dataset)
    parameters = dict(spec["parameters"])
    for key, value in parameters.items():
        if isinstance(value, str) and value.startswith("mirror:"):
            parameters[key] = str(Path(config["data"]["mirror"] or "(data.mirror is not set)") / value.removeprefix("mirror:"))
    return {"name": wildcards.attack, "function": spec["function"], "parameters": parameters}


def victim_spec(wildcards):
    """All that makes a victim, as one plain dict: a change in it, and in nothing else, trains the victim again."""
    recipe = GRID.recipe(wildcards.recipe, wildcards.dataset)
    if wildcards.attack != "clean":
        recipe["training"] |= GRID.attack_training(wildcards.attack)
    return {
        "dataset": wildcards.dataset,
        "model": wildcards.model,
        "recipe": wildcards.recipe,
        "attack": attack_spec(wildcards),
        "rate": float(wildcards.rate),
        "seed": int(wildcards.seed),
        "settings": recipe,
    }


def trigger_spec(wildcards):
    """What a trigger depends on: not on the poison rate."""
    recipe = GRID.recipe(wildcards.recipe, wildcards.dataset)
    return {
        "dataset": wildcards.dataset,
        "attack": attack_spec(wildcards),
        "seed": int(wildcards.seed),
        "settings": recipe,
    }


def log_of(pattern, name):
    return f"logs/{pattern.removeprefix(config['results'] + '/')}/{name}.log"


def benchmark_of(pattern, name):
    return f"{config['results']}/benchmark/{pattern.removeprefix(config['results'] + '/')}/{name}.tsv"


def defence_spec(wildcards):
    return {
        "name": wildcards.defence,
        **GRID.defence(wildcards.defence, wildcards.dataset),
        "budget": {"name": wildcards.budget, **GRID.budget(wildcards.budget)},
    }


def code(script, *kinds, also=()):
    """Hash of what a job's code means: its script, and the attack, defence and model that it looks up by name."""

    def digest(wildcards):
        names = {kind: getattr(wildcards, kind) for kind in kinds}
        for kind, entry in (("attack", GRID.attack), ("defence", GRID.defence)):
            if kind in kinds and names[kind] != "clean":
                names[kind] = entry(names[kind], wildcards.dataset)["function"]
        return named_code(script, *names.items(), also=also)

    return digest


@functools.cache
def named_code(script, *names, also=()):
    """Hash of what a script means, with (kind, name) of what it looks up; `clean` is no attack."""
    return code_digest(SCRIPTS / script, *filter(None, (GRID.definitions[kind].get(name) for kind, name in names)), *also)


def block_name(cell):
    """Name of the rule that runs all defences of a paper on one victim."""
    keys = ("paper", "dataset", "model", "recipe", "attack", "rate", "seed")
    return "_".join(["purify", *(re.sub(r"\W", "_", cell[key]) for key in keys)])


def cell_folder(cell):
    return FOLDERS[cell["stage"]].format(**cell)


def cell_files(wildcards=None, paper=None, stage=None):
    """metrics.json of every cell; with report.allow_missing only of those that exist."""
    files = [f"{cell_folder(cell)}/metrics.json" for cell in GRID.cells(stage, paper)]
    files += [f"{cell['folder']}/metrics.json" for cell in family_cells(stage, paper)]
    files = list(dict.fromkeys(files))
    return [file for file in files if os.path.exists(file)] if config["report"]["allow_missing"] else files


def all_cell_files():
    """`cell_files` of all papers; those of blocks know their rule, which Snakemake need not look for."""
    return [BLOCK_METRICS.get(file, file) for file in cell_files()]


def family_cells(stage=None, paper=None):
    """Cells of the chosen papers that are not on image classifiers."""
    cells = [cell for key, part in FAMILY_CELLS.items() if paper in (None, key) for cell in part]
    return [cell for cell in cells if stage in (None, cell["stage"])]


def expected_cells():
    """Cells of every paper: one that two papers share stands in the table once for each."""
    cells = [{**cell, "folder": cell_folder(cell)} for paper in GRID.papers for cell in GRID.cells(paper=paper)]
    return cells + family_cells()


def only(papers):
    """A wildcard constraint: one of these papers, or none at all."""
    return "|".join(papers) or "none"


# what jobs that train ask a cluster for
GPU = 0 if config["device"] == "cpu" else 1

# of jobs that much waits for: victims, before the defences of those that are there
FIRST = 100

# jobs that a whole chain waits for cannot fill two cores side by side; at demo scale each of them takes both
CHAIN_THREADS = 2 if config["scale"] == "demo" else 1


def runtime_of(scale_minutes):
    """Minutes of a job at this scale, doubled with every attempt."""

    def minutes(wildcards, attempt):
        return scale_minutes[config["scale"]] * 2 ** (attempt - 1)

    return minutes


def memory_of(megabytes):
    """Memory of a job, raised by half with every attempt."""

    def size(wildcards, attempt):
        return int(megabytes * 1.5 ** (attempt - 1))

    return size


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


def feature_code(paper):
    attacks = {("attack", panel["attack"]["function"]) for panel in feature_panels(paper)}
    return named_code("feature_maps.py", *attacks, *{("model", cell["model"]) for _, _, cell in feature_cells(paper)})


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


def sheet_code(attacks):
    return named_code("contact_sheet.py", *{("attack", spec["function"]) for spec in attacks.values()})


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
