# Configuration, checked before any job, and what the rules of all families share.
import copy
import gc
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

from snakemake.cli import get_argument_parser
from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.utils import validate

from cupel import devices, locks
from cupel.digest import code_digest
from cupel.experiment import SCALES, Grid
from cupel.images.experiment import UNSET
from cupel.own import grid as own
from cupel.paths import Paths
from cupel.prepared import content
from cupel.settings import LIBRARY, PAPERS, ConfigError, check_schema, schema, typed

# planning makes millions of objects that stay: the collector has nothing to do before the first job, see `onstart`
gc.disable()


# one environment and two clones: rules of this folder and papers of another would be run as if they were one
library = Path(str(workflow.current_basedir)).parent / "cupel"
if library.is_dir() and not library.samefile(LIBRARY):
    raise WorkflowError(
        f"This workflow has its own library, {library}, and Python finds that of another folder: {LIBRARY}\n"
        f"Use this folder's environment (make .venv/.installed), or: export PYTHONPATH={shlex.quote(str(library.parent))}"
    )

# Snakemake hands this path to a shell as it is
if shlex.quote(sys.executable) != sys.executable:
    raise WorkflowError(
        f"The path of Python has a space, a quote or the like: {sys.executable}\n"
        "Move the folder, or make the environment elsewhere: make reproduce VENV=/a/plain/path"
    )


def checked(function):
    """The same function, whose complaints about settings end the run in a sentence before its first job."""

    def call(*arguments, **options):
        try:
            return function(*arguments, **options)
        except ConfigError as error:
            raise WorkflowError(f"The configuration is wrong; nothing was run.\n{error}") from None

    return call


def targets():
    """What the command line asks for; Snakemake has read it, and tells the Snakefile only later."""
    program = Path(sys.argv[0]).parts[-2:]  # `python -m snakemake` is its __main__.py
    if not (program[-1:] == ("snakemake",) or program == ("snakemake", "__main__.py")) or not workflow.is_main_process:
        return []
    return get_argument_parser().parse_known_args(sys.argv[1:])[0].targets


config.update(typed(config, schema("config")))
checked(check_schema)(config, schema("config"), "config.yaml")
validate(config, "../schemas/config.schema.yaml")  # fills in the defaults
for part, key, name in ((config, "results", "results"), (config["data"], "folder", "data.folder")):
    if "://" in part[key]:
        raise WorkflowError(f"The configuration is wrong; nothing was run.\nconfig.yaml: {name}: {part[key]} is an address")
    part[key] = os.path.normpath(os.path.expanduser(part[key]))  # `out/` is `out`, and `~` no folder of that name
    if os.path.isfile(part[key]):
        raise WorkflowError(f"The configuration is wrong; nothing was run.\nconfig.yaml: {name}: {part[key]} is a file")
TARGETS = targets()
if papers := [name for name in TARGETS if name != "zoo" and (PAPERS / name / "experiment.yaml").is_file()]:
    # a paper asked for by name is run whether or not it stands in `papers`, and alone; jobs on a cluster are told so
    config["papers"] = papers
    kept_settings = [text for text in workflow.config_settings.config_args or [] if not text.startswith("papers=")]
    workflow.config_settings.config_args = [*kept_settings, f"papers=[{','.join(papers)}]"]
OWN = checked(own.Grid)(config["own"]) if config["own"] else None
if OWN:
    config["plugins"] = list(dict.fromkeys([*config["plugins"], *OWN.plugins]))
ASKED = {"seeds": config["seeds"], "plugins": config["plugins"], "mirror": config["data"]["mirror"]}
GRID = checked(Grid)(config["papers"], config["scale"], jobs=config["jobs"], **ASKED)
ZOO = checked(Grid)(["zoo"], config["scale"], **ASKED)
IMAGES, ROBUST, TEXT, VISION_LANGUAGE = (GRID.families[name] for name in ("images", "robust", "text", "vision_language"))

PATHS = Paths(config["results"], config["scale"], config["data"]["folder"])
DATA, RESULTS = PATHS.data, PATHS.root
# not workflow.basedir, which differs between Snakefile and workflow/Snakefile
ROOT, SCRIPTS = str(LIBRARY.parents[1]), LIBRARY.parent / "scripts"
TEMPLATES = sorted((LIBRARY / "reporting").glob("*.j2"))

# whether data and results are kept in a store, and here are only copies of what a job needs (docs/cluster.md)
STORED = workflow.storage_settings.default_storage_provider is not None


def stored(path):
    """The path as Snakemake makes it of a rule's file: that of the copy here, which knows where in the store it is from."""
    return workflow.modifier.path_modifier.apply_default_storage(path)


def here(path):
    """Where a job finds a file or folder of the run: with a store at its copy. Of inputs and outputs Snakemake knows that; paths
    in parameters must say it."""
    return str(stored(path)) if STORED else path


def brought(files):
    """Files that a job finds beside its inputs. From a store inputs alone are fetched, so there they are inputs too."""
    return list(files) if STORED else []


# what makes or reads files that no rule names, and which are therefore not kept in a store
UNNAMED = [name for family in (TEXT, VISION_LANGUAGE) for name in family.papers]
UNNAMED += [key for key in ("own", "released_weights") if config[key]]
UNNAMED += [f"report.{key}" for key, value in config["report"].items() if value]
if STORED and UNNAMED:
    raise WorkflowError(
        "The configuration is wrong; nothing was run.\n"
        f"config.yaml: not with files in a store: {', '.join(UNNAMED)}, see docs/cluster.md"
    )

# the settings as they were given, for pages; scripts look up the folder of prepared data in `config`
SETTINGS = copy.deepcopy(config)
config["data"]["folder"] = here(DATA)


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


def before_the_first_job():
    """What may be missing while nothing is run but planned."""
    wanting = [
        job for job in workflow.dag.needrun_jobs() if not config["data"]["mirror"] and UNSET in str(job.params.get("spec"))
    ]
    if wanting:
        attack = wanting[0].params.spec["attack"]
        raise WorkflowError(
            f"Nothing was run: config.yaml: data.mirror is not set, and attack {attack['name']} reads a file of it: "
            f"{attack['settings']}"
        )
    try:
        if workflow.local_exec and (said := devices.check(config["device"])):
            logger.warning(said)
        locks.hold(here(config["results"]), logger.warning)
        made = (Path(file) for job in workflow.dag.needrun_jobs() for file in job.output if "manifest" in file)
        locks.prepare(sorted({file.parent for file in made if file.name == "manifest.json" and file.is_relative_to(DATA)}))
    except (RuntimeError, OSError) as error:
        raise WorkflowError(f"Nothing was run: {error}") from None


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


def only(names):
    """A wildcard constraint: one of these names, or none at all."""
    return "|".join(map(re.escape, names)) or "none"


def present(files):
    """The files; with report.allow_missing only those that exist."""
    return [file for file in files if not config["report"]["allow_missing"] or os.path.exists(file)]


def cell_files():
    """The record of every cell."""
    return present(dict.fromkeys(f"{PATHS.cell(cell)}/metrics.json" for cell in GRID.cells()))


# what jobs that train ask a cluster for
GPU = 0 if config["device"] == "cpu" else 1

# of jobs that much waits for: victims, before the defences of those that are there
FIRST = 100


def memory_of(megabytes):
    """Memory of a job, raised by half with every attempt."""

    def size(wildcards, attempt):
        known = megabytes(wildcards) if callable(megabytes) else megabytes
        return int(known * 1.5 ** (attempt - 1))

    return size


def training(vram, memory, **minutes):
    """Resources of a job that trains: MB on the device and in memory, and minutes at each scale, doubled with every attempt."""

    def runtime(wildcards, attempt):
        return {"smoke": 5, "desk": 60, **minutes}[config["scale"]] * 2 ** (attempt - 1)

    return {"gpu": GPU, "vram_mb": vram, "mem_mb": memory_of(memory), "runtime": runtime}


# image classifiers

TRIGGER, VICTIM, PURIFIED = (PATHS.stage("images", stage) for stage in ("trigger", "victim", "purified"))


def image_content(cell):
    """What the data set of a cell holds. Prepared data count by this parameter, not by the age of their files."""
    folder = f"{DATA}/images/{cell['dataset']}"
    return stored_content(folder) if STORED else content(folder)


STORED_CONTENT = {}


def stored_content(folder):
    """As `content`, by the manifest in the store, which is asked until there is one."""
    if not STORED_CONTENT.get(folder):
        manifest = stored(f"{folder}/manifest.json").flags["storage_object"]
        with tempfile.TemporaryDirectory() as copied:
            manifest.set_local_path(Path(copied, "manifest.json"))
            if manifest.exists():
                manifest.retrieve_object()
            STORED_CONTENT[folder] = content(copied)
    return STORED_CONTENT[folder]


def image_files(wildcards):
    """Arrays of a data set."""
    folder = f"{DATA}/images/{wildcards['dataset']}"
    arrays = [f"{folder}/{split}_{part}.npy" for split in ("train", "test") for part in ("images", "labels")]
    return arrays + brought([f"{folder}/manifest.json"])


def prepared_trigger(wildcards):
    return f"{TRIGGER}/trigger.npz".format(**wildcards) if IMAGES.needs(wildcards.attack) else []


def clean_twin(wildcards):
    """The classifier trained on clean data with the same recipe and seed, for triggers that are made with one."""
    twin = VICTIM.format(**{**wildcards, "attack": "clean", "rate": "0"})
    return f"{twin}/model.safetensors" if IMAGES.needs(wildcards.attack) == "clean_model" else []


# robust training

TRAINED, ATTACKED = (PATHS.stage("robust", stage) for stage in ("trained", "attacked"))


def robust_memory(wildcards):
    """Images of 224x224 are many times larger, and held twice."""
    return 24000 if wildcards.dataset == "restricted_imagenet" else 3000


# language models

TEXT_VICTIM, TEXT_PURIFIED = (PATHS.stage("text", stage) for stage in ("victim", "purified"))
TEXT_FILES = {part: f"{TEXT_VICTIM}/texts/{part}.jsonl" for part in ("train", "defence", "triggered", "clean", "heldout")}
TEXT_FILES["summary"] = f"{TEXT_VICTIM}/texts/summary.json"


def language_model(wildcards):
    """A base model: what is asked for, and what is there."""
    return of_path(TEXT.source)(wildcards), content(f"{DATA}/language_models/{wildcards.model}")


def text_content(wildcards):
    """What the prepared data sets hold that a cell reads, by name."""
    return {name: content(f"{DATA}/text/{name}") for name in of_path(TEXT.texts)(wildcards)}


def text_records(wildcards):
    return [f"{DATA}/text/{name}/{file}" for name in text_content(wildcards) for file in ("manifest.json", "records.jsonl")]


def text_needs(what):
    """Megabytes that a model needs, of the device or of memory."""
    usual = {"vram_mb": 8000, "mem_mb": 4000}
    return lambda wildcards: TEXT.find("models", wildcards.model).get(what, usual[what])


def text_paths(wildcards):
    """Texts of a victim by part."""
    return {part: file.format(**wildcards) for part, file in TEXT_FILES.items()}


def reference_model(wildcards):
    """The adapter of the victim that a defence compares with, where it is not the base model."""
    cell = of_path(TEXT.reference)(wildcards)
    return f"{TEXT_VICTIM}/model".format(**cell) if cell else []


# vision-language models

BASE, POISONED, TRIGGERED, POISONED_MODEL, FILTERED, CLEANED = (
    PATHS.stage("vision_language", stage) for stage in ("base", "poisoned", "triggered", "victim", "filtered", "purified")
)


def base_model(wildcards):
    """The model that the pipeline builds; published models come from the hub or a folder."""
    return f"{BASE}/model".format(**wildcards) if wildcards.model in VISION_LANGUAGE.built() else []


def vision_language_content(wildcards):
    """A data set: what is asked for, and what is there."""
    return of_path(VISION_LANGUAGE.source)(wildcards), content(f"{DATA}/vision_language/{wildcards.dataset}")


def kept(output):
    """Weights of a victim. At scale paper they are 14 GB each, and are removed once all that looks into them is done."""
    return temp(output) if config["scale"] == "paper" else output


def flags_of_defence(wildcards):
    """What the filter of a defence decided."""
    name = checked(VISION_LANGUAGE.filter_of)(wildcards.defence)
    return f"{FILTERED}/flags/{name}.json".format(**wildcards)
