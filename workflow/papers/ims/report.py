"""Tables and figures of Invertible Pruning Masks, and of the sweep over the inner step: how far perturbations reach."""

import pandas as pd

from cupel.reporting import images
from cupel.reporting.figures import lines
from cupel.reporting.paper import Paper, history
from cupel.reporting.tables import setting_name, summary


def draw(paper: Paper) -> None:
    """What every paper on image classifiers shows, and where several steps were run, what their reach does."""
    images.draw(paper)
    reach = {name: reach_of(entry["settings"]) for name, entry in paper.facts["defences"].items()
             if entry["function"] == "ims"}
    own, table = images.prepared(paper)
    runs = own[(own.metric == "asr") & own.method.isin(reach) & (own.status == "ok")]
    flips = summary(runs.assign(metric="flips", value=[flip_rate(path) for path in runs.path], low=float("nan"),
                                high=float("nan")))
    rows = pd.concat([table[table.method.isin(reach)], flips])
    shown = {"asr": "ASR", "ra": "RA", "acc": "ACC", "flips": "predictions flipped by δ"}
    rows = rows.assign(reach=rows.method.map(reach), setting=[setting_name(row) for row in rows.itertuples()])
    for names, part in rows.groupby(["dataset", "model", "recipe", "budget"], sort=False):
        if part.reach.nunique() > 2:
            figure = lines(part, "reach", shown, "setting", xlabel="step × number of steps")
            figure.axes[0].axvline(0.02, color="grey", ls=":", lw=1)  # of the released settings
            paper.figure(f"reach_{'_'.join(names)}", figure, "The inner problem of IMS: how far its steps can move a pixel, "
                         "what is left of the backdoor, and how often they change the victim's prediction. "
                         f"({', '.join(names)}, mean over {int(part.seeds.max())} seed(s))")


def reach_of(hyperparameters: dict) -> float:
    """How far the inner steps can move a pixel: the step times their number."""
    return hyperparameters.get("lr_perturb", 0.001) * hyperparameters.get("steps_perturb", 20)


def flip_rate(folder: str) -> float:
    """How often the perturbations of a run changed the victim's prediction, mean over the rounds that have any."""
    return history(folder).get("flip_rate", pd.Series(dtype=float)).mean()
