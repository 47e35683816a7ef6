# Where the networks that the authors released lie, and where what is measured of them goes

RELEASED = f"{RESULTS}/robust/released_weights"
RELEASED_SCRIPTS = GRID.file("proper_interpretability", "scripts")


def released_networks():
    """Methods of which the user's folder has the authors' network for MNIST Small."""
    folder = config["released_weights"]
    if not folder:
        raise WorkflowError(
            "config.yaml: released_weights is not set: give the folder `networks` of the repository of proper_interpretability"
        )
    files = {method: f"{folder}/mnist_smallgap_{method}_100.pkl" for method in ROBUST.entries["defences"]}
    found = {method: file for method, file in files.items() if os.path.isfile(file)}
    if not found:
        raise WorkflowError(f"config.yaml: released_weights: {folder} has no file mnist_smallgap_<method>_100.pkl")
    return found


def trained_verdicts():
    """Verdicts on the networks trained here, where the report of the paper has been made."""
    file = f"{PATHS.paper('proper_interpretability')}/claims.csv"
    return [file] if os.path.isfile(file) else []
