"""Tables and figures of Invertible Pruning Masks, and of the sweep over the inner step: how far perturbations reach."""

import pandas as pd

from cupel.reporting import images
from cupel.reporting.figures import COLOURS, errors, marker, plt
from cupel.reporting.paper import Paper, history


def draw(paper: Paper) -> None:
    """What every paper on image classifiers shows, and where several steps were run, what their reach does."""
    images.draw(paper)
    reach = {name: reach_of(entry["settings"]) for name, entry in paper.facts["defences"].items()
             if entry["function"] == "ims"}
    own, table = images.prepared(paper)
    runs = own[(own.metric == "asr") & own.method.isin(reach) & (own.status == "ok")]
    flips = pd.DataFrame({"attack": runs.attack, "dataset": runs.dataset, "model": runs.model,
                          "reach": runs.method.map(reach), "flips": map(flip_rate, runs.path)})
    for (dataset, model), part in table[table.method.isin(reach)].groupby(["dataset", "model"], sort=False):
        steps = part.assign(reach=part.method.map(reach))
        if steps.reach.nunique() > 2:
            same = flips[(flips.dataset == dataset) & (flips.model == model)]
            paper.figure(f"reach_{dataset}_{model}", reach_curves(steps, same), "The inner problem of IMS: how far its steps "
                         f"can move a pixel, what is left of the backdoor, and how often they change the victim's prediction. "
                         f"({dataset}, {model})")


def reach_of(hyperparameters: dict) -> float:
    """How far the inner steps can move a pixel: the step times their number."""
    return hyperparameters.get("lr_perturb", 0.001) * hyperparameters.get("steps_perturb", 20)


def flip_rate(folder: str) -> float:
    """How often the perturbations of a run changed the victim's prediction, mean over the rounds that have any."""
    return history(folder).get("flip_rate", pd.Series(dtype=float)).mean()


def reach_curves(table: pd.DataFrame, flips: pd.DataFrame):
    """ASR, RA, ACC and the share of flipped predictions against the reach of the perturbations, a line per attack.

    Args:
        table: `cupel.reporting.tables.summary` with a column `reach` (pixels in [0, 1]).
        flips: columns attack, reach, flips.
    """
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), sharey=True, layout="constrained")
    for k, attack in enumerate(dict.fromkeys(table.attack)):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": marker(k), "label": attack, "lw": 1.2}
        for axis, metric in zip(axes, ("asr", "ra", "acc"), strict=False):
            rows = table[(table.attack == attack) & (table.metric == metric)].sort_values("reach")
            axis.errorbar(rows.reach, rows.value, yerr=errors(rows), capsize=2, **style)
            axis.set_title(metric.upper())
        rows = flips[flips.attack == attack].sort_values("reach")
        axes[3].plot(rows.reach, rows.flips, **style)
    axes[3].set_title("predictions flipped by δ")
    for axis in axes:
        axis.set(xscale="log", xlabel="reach: step × number of steps", ylim=(-0.02, 1.02))
    axes[0].axvline(0.02, color="grey", ls=":", lw=1)
    axes[0].legend(fontsize=7)
    return figure
