"""Figures of the image papers. Every function returns a matplotlib figure and reads plain tables or arrays."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cupel.files import atomic
from cupel.rng import rng

# Okabe and Ito's colours, which stay apart for colour-blind readers
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
MARKERS = "osD^vP*Xd<>h"

plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 130, "font.size": 9, "axes.spines.top": False,
                     "axes.spines.right": False, "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.25})


def save(figure, path) -> None:
    """Write a figure atomically and close it."""
    with atomic(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")
    plt.close(figure)


def _styles(labels: list[str]) -> dict[str, tuple]:
    return {label: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]) for i, label in enumerate(labels)}


def acc_asr_scatter(table: pd.DataFrame, order: list[str]):
    """ACC against ASR, a panel per poison rate, a colour per defence, a marker per attack; bars are 95 % intervals.

    Args:
        table: `cupel.reporting.tables.summary`.
        order: labels, in the order of the legend.
    """
    rates = sorted(table.poison_rate.unique(), reverse=True)
    attacks = list(dict.fromkeys(table.attack))
    colours = _styles(order)
    figure, axes = plt.subplots(1, len(rates), figsize=(3.9 * len(rates) + 1.6, 3.8), sharex=True, sharey=True,
                                squeeze=False, layout="constrained")
    for axis, rate in zip(axes[0], rates, strict=True):
        part = table[table.poison_rate == rate]
        sides = part.pivot_table(index=["attack", "label"], columns="metric", values=["value", "low", "high"])
        for (attack, label), row in sides.iterrows():
            if label not in colours:
                continue
            x, y = row["value"]["asr"], row["value"]["acc"]
            axis.errorbar(x, y, xerr=[[max(0, x - row["low"]["asr"])], [max(0, row["high"]["asr"] - x)]],
                          yerr=[[max(0, y - row["low"]["acc"])], [max(0, row["high"]["acc"] - y)]],
                          color=colours[label][0], marker=MARKERS[attacks.index(attack)], ms=7, lw=0.8, mec="white")
        axis.set(title=f"poison rate {100 * rate:g} %", xlabel="ASR (lower is better)", xlim=(-0.04, 1.04))
    axes[0, 0].set_ylabel("ACC (higher is better)")
    handles = [plt.Line2D([], [], color=colours[label][0], marker="o", ls="", label=label) for label in order]
    handles += [plt.Line2D([], [], color="grey", marker=MARKERS[i], ls="", label=attack) for i, attack in enumerate(attacks)]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def asr_bars(table: pd.DataFrame, order: list[str], metric: str = "asr"):
    """A metric by defence and poison rate, a panel per attack, with 95 % intervals."""
    attacks = list(dict.fromkeys(table.attack))
    colours = dict(zip(sorted(table.poison_rate.unique(), reverse=True), [COLOURS[k] for k in (5, 1, 3, 6, 2, 7)],
                       strict=False))
    figure, axes = plt.subplots(1, len(attacks), figsize=(4.4 * len(attacks), 3.3), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, attack in zip(axes[0], attacks, strict=True):
        rates = [rate for rate in colours if rate in set(table.poison_rate[table.attack == attack])]
        for k, rate in enumerate(rates):
            rows = table[(table.attack == attack) & (table.poison_rate == rate) & (table.metric == metric)]
            rows = rows.drop_duplicates("label").set_index("label").reindex(order)
            x = np.arange(len(order)) + (k - (len(rates) - 1) / 2) * 0.8 / len(rates)
            errors = np.clip([rows.value - rows.low, rows.high - rows.value], 0, None)
            axis.bar(x, rows.value, 0.8 / len(rates), yerr=errors, label=f"{100 * rate:g} %",
                     color=colours[rate], error_kw={"lw": 0.8})
            for position, row in zip(x, rows.itertuples(), strict=True):
                if np.isnan(row.value) and not np.isnan(row.failed) and row.failed:
                    axis.text(position, 0.02, "failed", rotation=90, ha="center", va="bottom", color="crimson", fontsize=7)
        axis.set_xticks(range(len(order)), order, rotation=35, ha="right")
        axis.set(title=attack, ylim=(0, 1.02))
        if len(rates) > 1:
            axis.legend(title="poison rate", loc="upper right", frameon=True, framealpha=0.8, fontsize=7)
    axes[0, 0].set_ylabel(metric.upper())
    return figure


def training_curves(histories: dict[str, pd.DataFrame]):
    """Loss, accuracy on clean and success on poisoned training samples against the epoch, a line per victim."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
    for colour, (name, rows) in zip(COLOURS * 9, histories.items(), strict=False):
        for axis, column in zip(axes, ("loss", "acc", "acc_poisoned"), strict=True):
            if column in rows and rows[column].notna().any():
                axis.plot(rows.epoch, rows[column], color=colour, label=name, marker=".", lw=1.2)
    for axis, title in zip(axes, ("training loss", "accuracy, clean training samples", "target hit, poisoned training samples"),
                           strict=True):
        axis.set(title=title, xlabel="epoch")
    axes[1].set_ylim(0, 1)
    axes[2].set_ylim(0, 1.02)
    axes[0].legend(fontsize=7)
    return figure


def asr_against_epochs(points: pd.DataFrame):
    """ASR against the length of training, a line per attack.

    Args:
        points: columns attack, epochs, asr, asr_low, asr_high.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    colours = _styles(list(dict.fromkeys(points.attack)))
    for attack, part in points.sort_values("epochs").groupby("attack", sort=False):
        colour, marker = colours[attack]
        errors = np.clip([part.asr - part.asr_low, part.asr_high - part.asr], 0, None)
        axis.errorbar(part.epochs, part.asr, yerr=errors, color=colour, marker=marker, label=attack, lw=1.2, capsize=2)
    axis.set(xlabel="epochs", ylabel="ASR", ylim=(-0.02, 1.02), xticks=sorted(points.epochs.unique()))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def feature_panels(panels: list[dict], classes: tuple[str, ...], target: int):
    """Two-dimensional maps of penultimate features: clean test images by class, triggered ones in black.

    Args:
        panels: dicts with title, points float [N, 2], labels int [N] (−1: triggered), row, note.
    """
    rows = list(dict.fromkeys(panel["row"] for panel in panels))
    columns = max(sum(panel["row"] == row for panel in panels) for row in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(2.9 * columns, 3.1 * len(rows)), squeeze=False,
                                layout="constrained")
    palette = plt.get_cmap("tab10" if len(classes) <= 10 else "gist_ncar")
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        axis.axis("off")
    for row_axes, row in zip(axes, rows, strict=True):
        for axis, panel in zip(row_axes, [p for p in panels if p["row"] == row], strict=False):
            axis.axis("on")
            points, labels = panel["points"], panel["labels"]
            for c in range(len(classes)):
                own = labels == c
                axis.scatter(*points[own].T, s=9 if c != target else 16, alpha=0.75, lw=0,
                             color=palette(c / 10 if len(classes) <= 10 else c / len(classes)))
            axis.scatter(*points[labels == -1].T, s=7, color="black", marker="x", lw=0.6)
            axis.set_title(f"{row}: {panel['title']}\n{panel['note']}", fontsize=8)
    handles = [plt.Line2D([], [], ls="", marker="o", color=palette(c / 10 if len(classes) <= 10 else c / len(classes)),
                          label=name + (" (target)" if c == target else "")) for c, name in enumerate(classes[:10])]
    handles.append(plt.Line2D([], [], ls="", marker="x", color="black", label="triggered"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def contact_sheet(clean: np.ndarray, stamped: dict[str, np.ndarray], amplify: int = 10):
    """Clean images, and for each attack the stamped ones and the amplified difference.

    Args:
        clean: uint8 [N, H, W, C].
        stamped: attack name to uint8 [N, H, W, C].
        amplify: factor of the difference, shown around grey.
    """
    count, names = len(clean), list(stamped)
    figure, axes = plt.subplots(1 + 2 * len(names), count, figsize=(1.02 * count + 1.4, 1.05 * (1 + 2 * len(names))),
                                squeeze=False, layout="constrained")

    def show(row: int, images: np.ndarray, title: str) -> None:
        for axis, image in zip(axes[row], images, strict=True):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)

    show(0, clean, "clean")
    for k, name in enumerate(names):
        difference = stamped[name].astype(int) - clean.astype(int)
        show(1 + 2 * k, stamped[name], name)
        show(2 + 2 * k, np.clip(128 + amplify * difference, 0, 255).astype(np.uint8), f"difference ×{amplify}")
    return figure


KINDS = {"pruning": COLOURS[5], "tuning": COLOURS[1], "inversion": COLOURS[3]}


def _mean(values: np.ndarray, name: str) -> tuple[float, float, float]:
    """Mean over settings and its bootstrap interval (95 %)."""
    draws = rng(0, "figure", name).choice(values, (2000, len(values))).mean(1)
    return values.mean(), *np.quantile(draws, [0.025, 0.975])


def families(table: pd.DataFrame):
    """ASR, ACC and RA of every defence, grouped by kind: a dot per setting, a bar for the mean over settings.

    Args:
        table: `cupel.reporting.tables.summary` of purified models with a column `kind` (pruning, tuning, inversion).
    """
    metrics = ("asr", "acc", "ra")
    known = table[table.kind.isin(KINDS) & table.value.notna()]
    means = known[known.metric == "asr"].groupby(["kind", "label"]).value.mean().reset_index()
    means["place"] = means.kind.map(list(KINDS).index)
    labels = list(means.sort_values(["place", "value"]).label)
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.34 * len(labels) + 1.4), sharey=True, layout="constrained")
    for axis, metric in zip(axes, metrics, strict=True):
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
    figure.legend(handles=[plt.Line2D([], [], color=KINDS[kind], lw=4, label=kind) for kind in present],
                  loc="outside lower center", ncols=3)
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
    colours = _styles(list(dict.fromkeys(part.label)))
    lines = list(part[["attack", "poison_rate"]].drop_duplicates().itertuples(index=False, name=None))
    counts = sorted(set(part.samples))
    for axis, metric in zip(axes, ("asr", "acc", "ra"), strict=True):
        for (label, attack, rate), rows in part[part.metric == metric].groupby(["label", "attack", "poison_rate"], sort=False):
            errors = np.clip([rows.value - rows.low, rows.high - rows.value], 0, None)
            axis.errorbar(rows.samples, rows.value, yerr=errors, color=colours[label][0], capsize=2, lw=1.2,
                          marker=MARKERS[lines.index((attack, rate))], ms=5)
        axis.set(xscale="log", xlabel="clean samples", title=metric.upper(), ylim=(-0.02, 1.02))
        axis.set_xticks(counts, [f"{count:g}" for count in counts])
        axis.xaxis.set_minor_formatter("")
    handles = [plt.Line2D([], [], color=colours[label][0], label=label) for label in colours]
    handles += [plt.Line2D([], [], color="grey", marker=MARKERS[k], ls="", label=f"{attack} {100 * rate:g} %")
                for k, (attack, rate) in enumerate(lines)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def reach_curves(table: pd.DataFrame, flips: pd.DataFrame):
    """ASR, RA, ACC and the share of flipped predictions against the reach of IMS's perturbations, a line per attack.

    Args:
        table: as in `families`, with a column `reach` (pixels in [0, 1]).
        flips: columns attack, reach, flips.
    """
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), sharey=True, layout="constrained")
    for k, attack in enumerate(dict.fromkeys(table.attack)):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k], "label": attack, "lw": 1.2}
        for axis, metric in zip(axes, ("asr", "ra", "acc"), strict=False):
            rows = table[(table.attack == attack) & (table.metric == metric)].sort_values("reach")
            errors = np.clip([rows.value - rows.low, rows.high - rows.value], 0, None)
            axis.errorbar(rows.reach, rows.value, yerr=errors, capsize=2, **style)
            axis.set_title(metric.upper())
        rows = flips[flips.attack == attack].sort_values("reach")
        axes[3].plot(rows.reach, rows.flips, **style)
    axes[3].set_title("predictions flipped by δ")
    for axis in axes:
        axis.set(xscale="log", xlabel="reach: step × number of steps", ylim=(-0.02, 1.02))
    axes[0].axvline(0.02, color="grey", ls=":", lw=1)
    axes[0].legend(fontsize=7)
    return figure
