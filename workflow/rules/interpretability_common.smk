# Settings and input functions of the papers on robust training by interpretation.
from cupel.robust.grid import Plan

PLANS = {
    paper: checked(Plan, paper, GRID.experiments[paper], GRID.file(paper, "experiment.yaml"), config["scale"], config["seeds"])
    for paper in GRID.papers_of("interpretability")
}
TRAINED = f"{RESULTS}/trained/{{dataset}}/{{model}}/{{recipe}}/{{method}}/seed{{seed}}"
ATTACKED = f"{RESULTS}/attacked/{{dataset}}/{{model}}/{{recipe}}/{{method}}/seed{{seed}}/{{evaluation}}"

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
