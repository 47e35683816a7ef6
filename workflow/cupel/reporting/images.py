"""The report of a paper on image classifiers: what any of them shows of ACC, ASR and RA."""

import numpy as np
import pandas as pd

from cupel.reporting import figures, tables
from cupel.reporting.figures import COLOURS, errors, handle, marker, plt, styles
from cupel.reporting.paper import Paper, victim_histories
from cupel.rng import rng

KINDS = {"pruning": COLOURS[5], "tuning": COLOURS[1], "inversion": COLOURS[3]}
METRICS = ("asr", "acc", "ra")


def prepared(paper: Paper) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells with an attack, named, and their means over seeds beside reported numbers."""
    labels = {"victim": "no defence", **paper.labels["defences"]}
    own = tables.with_names(paper.cells[paper.cells.attack != "clean"], labels)
    return own, tables.attach_reported(tables.summary(own), paper.reported)


def draw(paper: Paper) -> None:
    """Tables by budget, and figures, for every data set and network.

    `paper.labels` has `defences`; `paper.facts` has `kinds`: pruning, tuning or removal by added parts, by defence. Those
    without are in neither comparison.
    """
    own, table = prepared(paper)
    order = list(dict.fromkeys(["no defence", *paper.labels["defences"].values()]))
    sizes = {budget: size for budget, size in own.groupby("budget").clean_samples.max().items() if budget}
    paper.rows("cells", table.drop(columns="label"))
    for (dataset, model), part in table.groupby(["dataset", "model"], sort=False):
        for budget in dict.fromkeys(part.budget[part.budget != ""]):
            _tables(paper, part, order, budget)
        present = [label for label in order if label in set(part.label)]
        purified = part[part.method != "victim"].assign(kind=part.method.map(paper.facts["kinds"]))
        shown = {"scatter": (acc_asr_scatter(part, present),
                             "Clean accuracy against attack success: good defences stand top left.")}
        for metric, text in (("asr", "Attack success rate by defence and poison rate."),
                             ("acc", "Clean accuracy by defence and poison rate."),
                             ("ra", "Recovery: triggered images that are given their true class again.")):
            shown[metric] = figures.bars(part, present, metric), text
        if purified.kind.nunique() > 1:
            shown["families"] = families(purified), ("Pruning against fine-tuning: a point is a setting, a bar the mean with "
                                                     "its 95 % interval over settings.")
            shown["recovery"] = recovery(purified), ("Recovery of triggered images, mean over settings with a 95 % bootstrap "
                                                     "interval; the cross is the mean ACC.")
        if len(sizes) > 1:
            shown["budgets"] = budget_curves(purified, sizes), "Sensitivity to the number of clean samples."
        for kind, (figure, text) in shown.items():
            paper.figure(f"{kind}_{dataset}_{model}", figure, f"{text} ({dataset}, {model})")
    if histories := victim_histories(own):
        paper.figure("training", figures.training_curves(histories), "Training of the victims: loss, accuracy on clean "
                     "samples, share of poisoned samples that hit the target.")


def _tables(paper: Paper, part: pd.DataFrame, order: list[str], budget: str) -> None:
    """Tables of one budget, from the rows of a data set and network."""
    dataset, model = part[["dataset", "model"]].iloc[0]
    samples, known = int(part.n.max()), "in cells.csv." if part.reported.notna().any() else "not known."
    part = part[part.budget.isin(["", budget])]
    settings = (f"in percent on {dataset}, {model}, budget {budget}, scale {paper.scale}; mean over {int(part.seeds.max())} "
                f"seed(s), up to {samples} test images a cell. The paper's own numbers: {known}")
    stem = f"{dataset}_{model}_{budget}"
    for kind, grid, text, index in (
            ("acc_asr", tables.wide(part, order), "ACC and ASR", "defence"),
            ("ra", tables.wide(part, order, ("ra",)), "RA", "defence"),
            ("means", tables.means(part, order), "means over attacks and rates", "defence"),
            ("settings", tables.by_setting(part, order), "every setting with 95 % intervals", "setting: defence")):
        paper.table(f"{kind}_{stem}", grid, f"{paper.title}: {text} {settings}", index)


def acc_asr_scatter(table: pd.DataFrame, order: list[str]):
    """ACC against ASR, a panel per poison rate, a colour per defence, a marker per attack; bars are 95 % intervals.

    Args:
        table: `cupel.reporting.tables.summary`.
        order: labels, in the order of the legend.
    """
    rates = sorted(table.poison_rate.unique(), reverse=True)
    attacks = list(dict.fromkeys(table.attack))
    colours = styles(order)
    figure, axes = figures.panels(len(rates), len(rates), 3.9, 3.8, extra=1.6, sharex=True, sharey=True)
    for axis, rate in zip(axes[0], rates, strict=True):
        part = table[table.poison_rate == rate]
        sides = part.pivot_table(index=["attack", "label"], columns="metric", values=["value", "low", "high"])
        for (attack, label), row in sides.iterrows():
            if label not in colours:
                continue
            (x, x_errors), (y, y_errors) = ((row["value"][metric], [[max(0, row["value"][metric] - row["low"][metric])],
                                                                    [max(0, row["high"][metric] - row["value"][metric])]])
                                            for metric in ("asr", "acc"))
            axis.errorbar(x, y, xerr=x_errors, yerr=y_errors, color=colours[label][0], marker=marker(attacks.index(attack)),
                          ms=7, lw=0.8, mec="white")
        axis.set(title=f"poison rate {100 * rate:g} %", xlabel="ASR (lower is better)", xlim=(-0.04, 1.04))
    axes[0, 0].set_ylabel("ACC (higher is better)")
    handles = [handle(label, color=colours[label][0], marker="o", ls="") for label in order]
    handles += [handle(attack, color="grey", marker=marker(i), ls="") for i, attack in enumerate(attacks)]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _mean(values: np.ndarray, name: str) -> tuple[float, float, float]:
    """Mean over settings and its bootstrap interval (95 %); NaN for none."""
    if not len(values):
        return np.nan, np.nan, np.nan
    draws = rng(0, "figure", name).choice(values, (2000, len(values))).mean(1)
    return values.mean(), *np.quantile(draws, [0.025, 0.975])


def families(table: pd.DataFrame):
    """ASR, ACC and RA of every defence, grouped by kind: a dot per setting, a bar for the mean over settings.

    Args:
        table: `cupel.reporting.tables.summary` of purified models with a column `kind` (pruning, tuning, inversion).
    """
    known = table[table.kind.isin(KINDS) & table.value.notna()]
    means = known[known.metric == "asr"].groupby(["kind", "label"]).value.mean().reset_index()
    means["place"] = means.kind.map(list(KINDS).index)
    labels = list(means.sort_values(["place", "value"]).label)
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.34 * len(labels) + 1.4), sharey=True, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for place, label in enumerate(labels):
            part = known[(known.label == label) & (known.metric == metric)]
            colour = KINDS[part.kind.iloc[0]]
            value, low, high = _mean(part.value.to_numpy(), f"{metric}{label}")
            axis.barh(place, value, color=colour, alpha=0.35)
            axis.plot([low, high], [place, place], color=colour, lw=2)
            axis.plot(part.value, np.full(len(part), place), ".", color=colour, ms=4)
        axis.set(title=metric.upper(), xlim=(0, 1.02))
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    present = [kind for kind in KINDS if kind in set(known.kind)]
    figure.legend(handles=[handle(kind, color=KINDS[kind], lw=4) for kind in present], loc="outside lower center", ncols=3)
    return figure


def recovery(table: pd.DataFrame):
    """RA by defence, best first, over the settings that all of them have gone through; crosses are the mean ACC.

    Defences with less than half of the settings are left out.

    Args:
        table: as in `families`.
    """
    known = table[table.value.notna()]
    setting = ["attack", "attack_variant", "poison_rate", "budget"]
    wide = known[known.metric == "ra"].pivot_table(index=setting, columns="label", values="value")
    counts = wide.notna().sum()
    shared = wide.loc[:, counts >= counts.max() / 2].dropna()
    accs = known[known.metric == "acc"].groupby("label").value.mean()
    order = shared.mean().sort_values(ascending=False).index
    kinds = known.drop_duplicates("label").set_index("label").kind
    figure, axis = plt.subplots(figsize=(0.55 * len(order) + 2.5, 3.4), layout="constrained")
    for place, label in enumerate(order):
        value, low, high = _mean(shared[label].to_numpy(), label)
        axis.bar(place, value, color=KINDS.get(kinds[label], "grey"), yerr=[[value - low], [high - value]], error_kw={"lw": 1})
        axis.plot(place, accs[label], "x", color="black")
    axis.set_xticks(range(len(order)), order, rotation=35, ha="right")
    axis.set(ylabel="RA", ylim=(0, 1.02), title=f"mean over {len(shared)} settings")
    return figure


def budget_curves(table: pd.DataFrame, sizes: dict[str, float]):
    """ASR, ACC and RA against the number of clean samples, a line per defence and attack.

    Args:
        table: as in `families`.
        sizes: clean samples by name of the budget.
    """
    part = table.assign(samples=table.budget.map(sizes))
    several = part.groupby(["label", "attack", "poison_rate"]).samples.transform("nunique") > 1
    part = part[several].sort_values("samples")
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    colours = {label: colour for label, (colour, _) in styles(dict.fromkeys(part.label)).items()}
    lines = list(part[["attack", "poison_rate"]].drop_duplicates().itertuples(index=False, name=None))
    counts = sorted(set(part.samples))
    for axis, metric in zip(axes, METRICS, strict=True):
        for (label, attack, rate), rows in part[part.metric == metric].groupby(["label", "attack", "poison_rate"], sort=False):
            axis.errorbar(rows.samples, rows.value, yerr=errors(rows), color=colours[label], capsize=2, lw=1.2,
                          marker=marker(lines.index((attack, rate))), ms=5)
        axis.set(xscale="log", xlabel="clean samples", title=metric.upper(), ylim=(-0.02, 1.02))
        axis.set_xticks(counts, [f"{count:g}" for count in counts])
        axis.xaxis.set_minor_formatter("")
    handles = [handle(label, color=colour) for label, colour in colours.items()]
    handles += [handle(f"{attack} {100 * rate:g} %", color="grey", marker=marker(k), ls="")
                for k, (attack, rate) in enumerate(lines)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure
