# Settings and input functions of the papers on robust training by interpretation.
from cupel.robust.grid import Plan

PLANS = {
    paper: checked(Plan, paper, GRID.experiments[paper], GRID.file(paper, "experiment.yaml"), config["scale"], config["seeds"])
    for paper in GRID.papers_of("interpretability")
}
TRAINED = f"{RESULTS}/trained/{{dataset}}/{{model}}/{{recipe}}/{{method}}/seed{{seed}}"
ATTACKED = f"{RESULTS}/attacked/{{dataset}}/{{model}}/{{recipe}}/{{method}}/seed{{seed}}/{{evaluation}}"
RELEASED = f"{RESULTS}/released_weights"

for paper, plan in PLANS.items():
    FAMILY_CELLS[paper] = [
        {**cell, "folder": (ATTACKED if cell["evaluation"] else TRAINED).format(**cell)} for cell in plan.cells
    ]
    FAMILY_DATA[paper] = plan.datasets()


def plan_of(wildcards):
    """The paper whose experiment.yaml has this recipe."""
    for plan in PLANS.values():
        if wildcards.recipe in plan.recipes:
            return plan
    raise WorkflowError(f"no chosen paper (config.yaml, papers) has a recipe {wildcards.recipe!r} of robust training")


def robust_spec(wildcards):
    names = ("dataset", "model", "recipe", "method", "seed")
    return checked(plan_of(wildcards).training, *(wildcards[name] for name in names))


def evaluation_spec(wildcards):
    return checked(plan_of(wildcards).evaluation, wildcards.evaluation, wildcards.dataset)


def robust_memory(wildcards, attempt):
    """Images of 224x224 are many times larger, and held twice."""
    return int((24000 if wildcards.dataset == "restricted_imagenet" else 3000) * 1.5 ** (attempt - 1))


def attacked_files(wildcards):
    """Arrays of a paper's evaluations; with report.allow_missing only of those that exist."""
    files = [file.replace("metrics.json", "evaluation.npz") for file in cell_files(paper=wildcards.paper, stage="attacked")]
    return [file for file in files if os.path.exists(file)] if config["report"]["allow_missing"] else files


def robust_labels(wildcards):
    return PLANS[wildcards.paper].labels()


def robust_facts(wildcards):
    return PLANS[wildcards.paper].facts()


def released_plan():
    for plan in PLANS.values():
        if "released" in plan.evaluations:
            return plan
    raise WorkflowError("released_weights belongs to proper_interpretability: name it in config.yaml, papers")


def released_networks():
    """Methods of which the user's folder has the authors' network for MNIST Small."""
    plan, folder = released_plan(), config["released_weights"]
    if not folder:
        raise WorkflowError(
            "config.yaml: released_weights is not set: give the folder `networks` of the repository of proper_interpretability"
        )
    files = {method: f"{folder}/mnist_smallgap_{method}_100.pkl" for method in plan.methods}
    found = {method: file for method, file in files.items() if os.path.isfile(file)}
    if not found:
        raise WorkflowError(f"config.yaml: released_weights: {folder} has no file mnist_smallgap_<method>_100.pkl")
    return found


def released_records(wildcards):
    return [f"{RELEASED}/{method}.json" for method in released_networks()]


def released_spec(wildcards):
    return released_plan().released("mnist")


def released_labels(wildcards):
    return released_plan().labels()
