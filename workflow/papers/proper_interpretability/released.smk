# Settings of the networks that the authors released, and where they are

RELEASED = f"{RESULTS}/released_weights"
RELEASED_SCRIPTS = GRID.file("proper_interpretability", "scripts")


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
