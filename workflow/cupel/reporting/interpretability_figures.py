"""Figures of the papers on robust training by interpretation. Every function returns a matplotlib figure."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from cupel.reporting.figures import _styles, plt


def curves(table: pd.DataFrame, x: str, order: Sequence[str], *, xlabel: str, ylabel: str, mark: float | None = None,
           logarithmic: bool = False, ylim: tuple | None = None, ticks: dict[float, str] | None = None):
    """A metric against a number, one line per method, with its 95 % interval where there is one.

    Args:
        table: columns label, `x`, value, low, high.
        x: column on the axis.
        order: labels, in the order of the legend.
        xlabel, ylabel, ylim: of the axes.
        mark: where a dotted line says "ε of the training".
        logarithmic: scale of the x axis.
        ticks: text at values of x.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.7), layout="constrained")
    colours = _styles(list(order))
    for label in order:
        part = table[table.label == label].sort_values(x)
        if part.empty:
            continue
        colour, marker = colours[label]
        axis.plot(part[x], part.value, color=colour, marker=marker, ms=4, lw=1.4, label=label)
        if part.low.notna().all():
            axis.fill_between(part[x], part.low, part.high, color=colour, alpha=0.10, lw=0)
    if mark is not None:
        axis.axvline(mark, color="grey", ls=":", lw=1)
        axis.text(mark, 1.0, " ε of the training", transform=axis.get_xaxis_transform(), va="bottom", ha="center", fontsize=7,
                  color="grey")
    if logarithmic:
        axis.set_xscale("log")
    if ticks:
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if ylim:
        axis.set_ylim(*ylim)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def time_against_robustness(table: pd.DataFrame, order: Sequence[str], eps: str):
    """Seconds of a training epoch against accuracy under PGD, a point per method.

    Args:
        table: columns label, seconds, value, low, high.
        order: labels.
        eps: text, at which ε the accuracy is.
    """
    figure, axis = plt.subplots(figsize=(6.0, 3.5), layout="constrained")
    colours = _styles(list(order))
    for row in table.itertuples():
        errors = [[max(0.0, row.value - row.low)], [max(0.0, row.high - row.value)]]
        axis.errorbar(row.seconds, row.value, yerr=errors, color=colours[row.label][0], marker=colours[row.label][1], lw=0.9,
                      ls="", label=row.label)
    axis.set(xlabel="seconds per training epoch", ylabel=f"accuracy under PGD, ε = {eps}", ylim=(-0.02, 1.02))
    axis.set_xlim(left=0)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def bound_scatter(panels: dict[str, tuple[np.ndarray, np.ndarray]]):
    """Discrepancy against its lower bound, a panel per method; no point may lie under the line.

    Args:
        panels: (bound, discrepancy) by label, float [n] each.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, 2.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.ravel()[len(panels):]:
        axis.axis("off")
    for axis, (label, (least, apart)) in zip(axes.ravel(), panels.items(), strict=False):
        end = 1.05 * max(apart.max(initial=0), least.max(initial=0), 1e-9)
        axis.plot([0, end], [0, end], color="grey", lw=1, ls="--")
        axis.scatter(least, apart, s=9, color="#0072B2", alpha=0.7, lw=0)
        ratio = np.median(apart / least) if len(least) else np.nan
        axis.set(title=f"{label}: median ratio {ratio:.2f}", xlim=(0, end), ylim=(0, end))
        axis.title.set_fontsize(8.5)
    figure.supxlabel("half of the clean margin (the bound)", fontsize=9)
    figure.supylabel("two-class l1 discrepancy / hw", fontsize=9)
    return figure


def _picture(axis, image: np.ndarray) -> None:
    """An image [C, H, W] in [0, 1]."""
    axis.imshow(np.clip(image.transpose(1, 2, 0).squeeze(), 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def maps_under_attack(rows: list[dict], classes: Sequence[str]):
    """One image per row: as it is, under PGD, under the sneaking attack; each with the maps of true class and target.

    Args:
        rows: dicts with label, images [3, C, H, W], maps [3, 2, h, w], predicted [3], classes [2] (true, target).
        classes: names.

    A map's colours run over ± the largest absolute value of its row, red positive; the number is Kendall's tau with the map of
    the clean image.
    """
    figure, axes = plt.subplots(len(rows), 9, figsize=(9.9, 1.32 * len(rows) + 0.35), squeeze=False, layout="constrained")
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    for line, row in zip(axes, rows, strict=True):
        height = np.abs(row["maps"]).max()
        line[0].set_ylabel(row["label"], fontsize=8)
        for k in range(3):
            _picture(line[3 * k], row["images"][k])
            said = classes[int(row["predicted"][k])]
            line[3 * k].set_xlabel(f"taken for {said}", fontsize=7, labelpad=2,
                                   color="black" if row["predicted"][k] == row["classes"][0] else "crimson")
            for j in range(2):
                axis = line[3 * k + 1 + j]
                axis.imshow(row["maps"][k, j], cmap="RdBu_r", vmin=-height, vmax=height, interpolation="nearest")
                tau = "" if k == 0 else f", τ {kendalltau(row['maps'][0, j].ravel(), row['maps'][k, j].ravel()).statistic:.2f}"
                axis.set_xlabel(f"map of {classes[int(row['classes'][j])]}{tau}", fontsize=7, labelpad=2)
    for k, title in enumerate(("clean", "PGD", "sneaking attack (ISA)")):
        axes[0, 3 * k].set_title(title, fontsize=9, loc="left")
    return figure


def tradeoff(panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]):
    """Discrepancy of one image against ε of the sneaking attack, a panel per method, a line per number of classes.

    Args:
        panels: by label, by scope: (ε, discrepancy), float [P] each.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.8 * columns + 0.6, 2.5 * rows), squeeze=False, layout="constrained")
    colours = _styles(["all", "two", "one"])
    markers = {"all": "o", "two": "s", "one": "D"}
    for axis in axes.ravel()[len(panels):]:
        axis.axis("off")
    for axis, (label, lines) in zip(axes.ravel(), panels.items(), strict=False):
        for scope, (eps, apart) in lines.items():
            axis.plot(eps, apart, color=colours[scope][0], marker=markers[scope], ms=4, lw=1.3,
                      label=f"{scope} class{'es' if scope != 'one' else ''}")
        axis.set_title(label, fontsize=9)
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("ε of the attack", fontsize=9)
    figure.supylabel("normalised l1 discrepancy", fontsize=9)
    return figure


def ablation(table: pd.DataFrame, reference: dict[str, float]):
    """Accuracy against γ, clean and attacked, a line per ε of the training; dashed: adversarial training.

    Args:
        table: columns gamma, train_eps (text), kind (`clean` or `attacked`), value, low, high.
        reference: accuracy under attack of Adv by ε of the training.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True, layout="constrained")
    names = list(dict.fromkeys(table.train_eps))
    colours = _styles(names)
    for axis, kind in zip(axes, ("clean", "attacked"), strict=True):
        for name in names:
            part = table[(table.kind == kind) & (table.train_eps == name)].sort_values("gamma")
            axis.plot(part.gamma, part.value, color=colours[name][0], marker="o", ms=4, label=f"trained at ε = {name}")
            axis.fill_between(part.gamma, part.low, part.high, color=colours[name][0], alpha=0.1, lw=0)
            if kind == "attacked" and name in reference:
                axis.axhline(reference[name], color=colours[name][0], ls="--", lw=1)
        gammas = sorted(set(table.gamma))
        axis.set_xticks(gammas, [f"{gamma:g}" for gamma in gammas])
        axis.set(title=kind, xlabel="γ")
    axes[0].set(ylabel="accuracy", ylim=(-0.02, 1.02))
    axes[0].legend(fontsize=8)
    return figure


def filters(panels: dict[str, np.ndarray]):
    """First-layer weights, a row per method, each filter scaled by its own largest absolute weight.

    Args:
        panels: float [d, C, k, k] by label; with C = 1 red is positive, with C = 3 grey is zero.
    """
    count = max(len(weights) for weights in panels.values())
    figure, axes = plt.subplots(len(panels), count, figsize=(0.55 * count + 0.9, 0.62 * len(panels) + 0.1), squeeze=False,
                                layout="constrained")
    for axis in axes.ravel():
        axis.axis("off")
    for line, (label, weights) in zip(axes, panels.items(), strict=True):
        for axis, weight in zip(line, weights, strict=False):
            scaled = weight / max(np.abs(weight).max(), 1e-12)
            if len(weight) == 3:
                axis.imshow((scaled.transpose(1, 2, 0) + 1) / 2, interpolation="nearest")
            else:
                axis.imshow(scaled[0], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        line[0].text(-0.15, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    return figure


def neurons(start: np.ndarray, reached: dict[str, np.ndarray], names: Sequence[str]):
    """Inputs that maximise neurons: a column per neuron, the seed images on top, a row per method.

    Args:
        start: float [m, C, H, W].
        reached: the same by label.
        names: class that each neuron speaks for.
    """
    rows = {"seed": start, **reached}
    figure, axes = plt.subplots(len(rows), len(start), figsize=(1.05 * len(start) + 0.8, 1.05 * len(rows) + 0.3),
                                squeeze=False, layout="constrained")
    for axis in axes.ravel():
        axis.axis("off")
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            _picture(axis, image)
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(f"for {name}", fontsize=8)
    return figure


def training(histories: dict[str, pd.DataFrame]):
    """Loss and accuracy of the training batches against the epoch, a line per method."""
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3), layout="constrained")
    colours = _styles(list(histories))
    for label, rows in histories.items():
        for axis, column in zip(axes, ("loss", "acc"), strict=True):
            axis.plot(rows.epoch, rows[column], color=colours[label][0], marker=colours[label][1] if len(rows) < 20 else "",
                      ms=4, lw=1.2, label=label)
    for axis, title in zip(axes, ("training loss", "accuracy under the loss's cross-entropy"), strict=True):
        axis.set(title=title, xlabel="epoch")
    axes[1].set_ylim(0, 1.02)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
