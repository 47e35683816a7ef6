# Cells of the papers on language models, and the input and parameter functions of their rules.

from cupel.text.grid import TASKS as LANGUAGE_TASKS, LanguageGrid

LANGUAGE_CELL = "language/{dataset}/{model}/{recipe}/{attack}@{rate}/seed{seed}"
LANGUAGE_VICTIM = f"{RESULTS}/victims/{LANGUAGE_CELL}"
LANGUAGE_PURIFIED = f"{RESULTS}/purified/{LANGUAGE_CELL}/{{defence}}@{{budget}}"
LANGUAGE_PAPER = f"{RESULTS}/papers/{{paper}}"
TEXT_FILES = {part: f"{part}.jsonl" for part in ("train", "defence", "triggered", "clean", "heldout")}
TEXT_FILES["summary"] = "summary.json"

LANGUAGE = {
    paper: checked(
        functools.partial(LanguageGrid, plugins=config["plugins"]),
        GRID.experiments[paper],
        config["scale"],
        config["seeds"],
        GRID.known[paper],
    )
    for paper in GRID.papers_of("language")
}
for paper, grid in LANGUAGE.items():
    FAMILY_CELLS[paper] = [
        {**cell, "folder": (LANGUAGE_VICTIM if cell["stage"] == "victim" else LANGUAGE_PURIFIED).format(**cell)}
        for cell in grid.cells
    ]
    FAMILY_DATA[paper] = sorted({f"text/{text}" for cell in grid.cells for text in grid.texts(cell)}) + sorted(
        {f"models/{cell['model']}" for cell in grid.cells}
    )


def language_grid(wildcards):
    """The paper whose file has the recipe of a cell."""
    for grid in LANGUAGE.values():
        if wildcards.recipe in grid.experiment["recipes"]:
            return grid
    raise WorkflowError(f"no paper in config.yaml: papers has the recipe {wildcards.recipe!r} of a language model")


def language_spec(wildcards):
    return checked(language_grid(wildcards).victim_spec, dict(wildcards.items()))


def compose_spec(wildcards):
    """What the texts of a victim depend on: neither model nor training nor evaluation."""
    spec = language_spec(wildcards)
    return {**spec, "settings": {"data": spec["settings"]["data"]}}


def language_defence(wildcards):
    return checked(language_grid(wildcards).defence_spec, dict(wildcards.items()))


def language_code(script):
    """Hash of a script's code, with the file of the defence of a cell, or, where there is none, of its trigger."""

    def digest(wildcards):
        grid = language_grid(wildcards)
        if "defence" in wildcards.keys():
            return code_digest(SCRIPTS / script, grid.code("defence", language_defence(wildcards)["function"]))
        return code_digest(SCRIPTS / script, grid.code("trigger", language_spec(wildcards)["attack"]["trigger"]))

    return digest


def language_source(wildcards):
    """Name and revision of a model, by its key."""
    for grid in LANGUAGE.values():
        if wildcards.model in grid.experiment["models"]:
            return {key: value for key, value in grid.model(wildcards.model).items() if key in ("name", "revision")}
    raise WorkflowError(f"no paper in config.yaml: papers has the language model {wildcards.model!r}")


def text_folders(wildcards):
    return {name: f"{DATA}/text/{name}" for name in language_grid(wildcards).texts(dict(wildcards.items()))}


def text_manifests(wildcards):
    return [f"{folder}/{name}" for folder in text_folders(wildcards).values() for name in ("manifest.json", "records.jsonl")]


def composed(wildcards):
    """Paths of a victim's texts."""
    return {part: f"{LANGUAGE_VICTIM}/texts/{name}".format(**wildcards) for part, name in TEXT_FILES.items()}


def base_folder(wildcards):
    return f"{DATA}/models/{wildcards.model}"


def base_manifest(wildcards):
    return f"{base_folder(wildcards)}/manifest.json"


def reference_model(wildcards):
    """The adapter of the victim that CleanGen compares with, where it is not the base model."""
    cell = checked(language_grid(wildcards).reference, dict(wildcards.items()))
    return f"{LANGUAGE_VICTIM}/model".format(**cell) if cell else []


def language_vram(wildcards):
    return language_grid(wildcards).model(wildcards.model).get("vram_mb", 8000)


def language_memory(wildcards, attempt):
    return int(language_grid(wildcards).model(wildcards.model).get("mem_mb", 4000) * 1.5 ** (attempt - 1))


def language_report(paper):
    """What the report of a paper needs beside the tidy table."""
    grid = LANGUAGE[paper]
    return {
        "labels": grid.labels("defences"),
        "attacks": grid.labels("attacks"),
        "models": grid.labels("models"),
        "claims": claims_of(paper),
        "title": grid.experiment["title"],
        "manifests": {name: f"{DATA}/{name}/manifest.json" for name in FAMILY_DATA[paper]},
    }
