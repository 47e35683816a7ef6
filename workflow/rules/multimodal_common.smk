# Settings and input functions of the papers on multimodal models.
from cupel.vision_language.grid import Plan as MultimodalPlan

MULTIMODAL = {
    paper: checked(
        functools.partial(MultimodalPlan, plugins=config["plugins"]),
        paper,
        GRID.experiments[paper],
        GRID.file(paper, "experiment.yaml"),
        config["scale"],
        config["seeds"],
    )
    for paper in GRID.papers_of("multimodal")
}
BASE = f"{RESULTS}/bases/{{dataset}}/{{model}}/seed{{seed}}"
POISONED = f"{RESULTS}/poisoned/{{dataset}}/{{attack}}@{{rate}}/seed{{seed}}"
TRIGGERED = f"{RESULTS}/triggered/{{dataset}}/{{attack}}/seed{{seed}}"
FILTERED = f"{RESULTS}/filtered/{{dataset}}/{{model}}/{{recipe}}/{{attack}}@{{rate}}/seed{{seed}}"
CLEANED = f"{RESULTS}/purified/{{dataset}}/{{model}}/{{recipe}}/{{attack}}@{{rate}}/seed{{seed}}/{{defence}}"
MULTIMODAL_FOLDERS = {"victim": VICTIM, "filtered": FILTERED, "purified": CLEANED}

for paper, plan in MULTIMODAL.items():
    FAMILY_CELLS[paper] = [{**cell, "folder": MULTIMODAL_FOLDERS[cell["stage"]].format(**cell)} for cell in plan.cells]
    FAMILY_DATA[paper] = plan.used("dataset")
    for name in plan.datasets:
        if name in DATASETS:
            raise WorkflowError(f"experiment.yaml of {paper}: datasets.{name}: there is an image data set of this name")


def multimodal_names(section):
    """Names in a section of the experiment.yaml of the chosen papers, each with its paper's plan."""
    return {name: plan for plan in MULTIMODAL.values() for name in getattr(plan, section)}


def multimodal_plan(wildcards):
    """The paper whose experiment.yaml has this data set."""
    return multimodal_names("datasets")[wildcards.dataset]


def multimodal_dataset(wildcards):
    return multimodal_plan(wildcards).find("datasets", wildcards.dataset)


def multimodal_defences(kind):
    """Names of the defences of a kind, in all chosen papers."""
    return [name for name, plan in multimodal_names("defences").items() if plan.defences[name]["kind"] == kind]


def spec_of(what, *keys):
    """A parameter function: what a plan says of these wildcards."""

    def spec(wildcards):
        values = [wildcards.get(key, "") for key in keys]
        return checked(getattr(multimodal_plan(wildcards), what), *values)

    return spec


base_spec = spec_of("base", "dataset", "model", "seed")
poison_spec = spec_of("poison", "dataset", "attack", "rate", "seed")
multimodal_victim_spec = spec_of("victim", "dataset", "model", "recipe", "attack", "rate", "seed")
multimodal_defence_spec = spec_of("defence", "defence")


def base_model(wildcards):
    """The model that the pipeline builds; published models come from the hub or a folder."""
    built = wildcards.model in multimodal_plan(wildcards).built()
    return f"{BASE}/model".format(**wildcards) if built else []


def kept(output):
    """Weights of a victim. At scale paper they are 14 GB each, and are removed once all that looks into them is done."""
    return temp(output) if config["scale"] == "paper" else output


def used_filters():
    """Filters of all chosen papers at this scale, name to function and hyperparameters."""
    return {name: entry for plan in MULTIMODAL.values() for name, entry in plan.filters().items()}


def flag_names():
    return list(used_filters())


def flags_of_defence(wildcards):
    name = checked(multimodal_plan(wildcards).filter_of, wildcards.defence)
    return f"{FILTERED}/flags/{name}.json".format(**wildcards)


def filter_specs(wildcards):
    return {"filters": used_filters(), "taus": multimodal_plan(wildcards).taus}


def trigger_code(wildcards):
    """Hash of the code that poisons, with the file of the trigger, which may be a plugin."""
    plan = multimodal_plan(wildcards)
    function = checked(plan.attack, wildcards.attack)["function"]
    return code_digest(SCRIPTS / "poison_samples.py", plan.code("trigger", function))


def filters_code(wildcards):
    """Hash of the code that flags samples, with the files of all filters at this scale."""
    plan = multimodal_plan(wildcards)
    files = [plan.code("filter", entry["function"]) for entry in used_filters().values()]
    return code_digest(SCRIPTS / "measure_filters.py", *files)


def refit_code(wildcards):
    """Hash of the code that fits again, and of the filter whose decision it takes."""
    plan = multimodal_plan(wildcards)
    function = checked(plan.defence, wildcards.defence)["function"]
    return code_digest(SCRIPTS / "refit.py", SCRIPTS / "measure_filters.py", plan.code("filter", function))


def pictures_code(wildcards):
    """Hash of the code that purifies pictures, with the file of the defence."""
    plan = multimodal_plan(wildcards)
    function = checked(plan.defence, wildcards.defence)["function"]
    return code_digest(SCRIPTS / "purify_pictures.py", plan.code("pictures", function))


def filtered_records(wildcards):
    """What the filters' jobs tell of themselves, for the figures."""
    return [file.replace("metrics.json", "filters.json") for file in cell_files(paper=wildcards.paper, stage="filtered")]


def base_records(wildcards):
    cells = FAMILY_CELLS[wildcards.paper]
    built = MULTIMODAL[wildcards.paper].built()
    files = dict.fromkeys(f"{BASE}/base.json".format(**cell) for cell in cells if cell["model"] in built)
    return [file for file in files if os.path.exists(file)] if config["report"]["allow_missing"] else list(files)


def multimodal_report(wildcards):
    """What the report must know of the experiment file besides the cells."""
    plan = MULTIMODAL[wildcards.paper]
    return {
        "labels": plan.labels("defences"),
        "attacks": {name: {**plan.attack(name), "label": label} for name, label in plan.labels("attacks").items()},
        "datasets": {name: plan.datasets[name]["dataset"] for name in plan.used("dataset")},
        "target": plan.target,
    }
