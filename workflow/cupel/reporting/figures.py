"""What all figures share: colours, style, panels, error bars, and the few figures that more than one paper draws."""

from collections.abc import Iterable, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cupel.files import atomic

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


def styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each label, no two alike for the first 96."""
    return {label: (COLOURS[i % len(COLOURS)], marker(i // len(COLOURS))) for i, label in enumerate(labels)}


def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: those that stay apart for all readers, where they are enough."""
    names = list(dict.fromkeys(names))
    many = plt.get_cmap("tab20")
    return {name: COLOURS[k] if len(names) <= len(COLOURS) else many(k % 20) for k, name in enumerate(names)}


def marker(number: int) -> str:
    """One of the markers, round and round."""
    return MARKERS[number % len(MARKERS)]


def panels(count: int, most: int, width: float, height: float, *, extra: float = 0.0, **options):
    """A figure of `count` panels, up to `most` in a row, each `width` by `height` inches; panels too many are blank.

    Returns:
        The figure, and its axes [rows, columns].
    """
    columns = min(count, most)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns + extra, height * rows), squeeze=False,
                                layout="constrained", **options)
    for axis in axes.ravel()[count:]:
        axis.axis("off")
    return figure, axes


def bare(axes) -> None:
    """Axes that hold pictures: no ticks, no grid, no frame."""
    for axis in np.ravel(axes):
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)


def side_title(axis, text: str) -> None:
    """A title to the left of a row of pictures."""
    axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)


def errors(rows: pd.DataFrame, name: str = "") -> np.ndarray:
    """Lengths [2, N] of error bars, from the columns value, low and high, or `<name>`, `<name>_low` and `<name>_high`."""
    value, low, high = (rows[key] for key in ((name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")))
    return np.nan_to_num(np.clip(np.stack([value - low, high - value]), 0, None))


def handle(text: str, **style):
    """An entry of a legend."""
    return plt.Line2D([], [], label=text, **style)


def nothing(text: str):
    """A figure that says why there is none."""
    figure, axis = plt.subplots(figsize=(5, 1.2))
    axis.axis("off")
    axis.text(0.5, 0.5, text, ha="center", va="center")
    return figure


def amplified(stamped: np.ndarray, clean: np.ndarray, factor: int) -> np.ndarray:
    """The difference of two uint8 pictures, `factor` times as large, around grey."""
    return np.clip(128 + factor * (stamped.astype(int) - clean.astype(int)), 0, 255).astype(np.uint8)


def bars(table: pd.DataFrame, order: Sequence[str], metric: str):
    """A metric by defence and poison rate, a panel per attack, with 95 % intervals.

    Args:
        table: `cupel.reporting.tables.summary`.
        order: labels of the defences.
        metric: name.
    """
    attacks = list(dict.fromkeys(table.attack))
    colours = dict(zip(sorted(table.poison_rate.unique(), reverse=True), [COLOURS[k] for k in (5, 1, 3, 6, 2, 7)],
                       strict=False))
    figure, axes = panels(len(attacks), len(attacks), 4.4, 3.3, sharey=True)
    for axis, attack in zip(axes[0], attacks, strict=True):
        rates = [rate for rate in colours if rate in set(table.poison_rate[table.attack == attack])]
        for k, rate in enumerate(rates):
            rows = table[(table.attack == attack) & (table.poison_rate == rate) & (table.metric == metric)]
            rows = rows.drop_duplicates("label").set_index("label").reindex(order)
            x = np.arange(len(order)) + (k - (len(rates) - 1) / 2) * 0.8 / len(rates)
            axis.bar(x, rows.value, 0.8 / len(rates), yerr=errors(rows), label=f"{100 * rate:g} %", color=colours[rate],
                     error_kw={"lw": 0.8})
            for position in x[rows.value.isna() & (rows.failed > 0)]:
                axis.text(position, 0.02, "failed", rotation=90, ha="center", va="bottom", color="crimson", fontsize=7)
        axis.set_xticks(range(len(order)), order, rotation=35, ha="right")
        axis.set(title=attack, ylim=(0, 1.02))
        if len(rates) > 1:
            axis.legend(title="poison rate", loc="upper right", frameon=True, framealpha=0.8, fontsize=7)
    axes[0, 0].set_ylabel(metric.upper())
    return figure


def key(figure, colours: dict[str, str], marks: dict[str, str], lines: bool = False) -> None:
    """Beside the panels: what colours and, where they say something else, markers stand for."""
    alike = list(colours) == list(marks)
    handles = [handle(name, color=colour, marker=marks[name] if alike else "" if lines else "o", ls="-" if lines else "")
               for name, colour in colours.items()]
    handles += [] if alike else [handle(name, color="grey", marker=mark, ls="") for name, mark in marks.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)


def lines(table: pd.DataFrame, x: str, metrics: dict[str, str], colour: str, marked: str | None = None, *,
          ticks: dict[float, str] | None = None, **axes_settings):
    """Metrics against a number, a panel each, with 95 % intervals.

    Args:
        table: columns metric, value, low, high, and those named here.
        x: column of the number.
        metrics: title of the panel by metric.
        colour, marked: columns that tell lines apart, by colour and by marker.
        ticks: texts at values of x; None: the numbers.
        axes_settings: of every panel, as `xlabel`.
    """
    figure, axes = panels(len(metrics), len(metrics), 3.4 if len(metrics) > 1 else 4.6, 3.4, extra=1.8)
    colours = palette(table[colour])
    marks = {name: marker(k) for k, name in enumerate(dict.fromkeys(table[marked or colour]))}
    ticks = ticks or {value: f"{value:g}" for value in sorted(set(table[x]))}
    for axis, (metric, title) in zip(axes[0], metrics.items(), strict=True):
        part = table[table.metric == metric].sort_values(x)
        for name, rows in part.groupby([colour, marked or colour], sort=False):
            axis.errorbar(rows[x], rows.value, yerr=errors(rows), color=colours[name[0]], marker=marks[name[1]], ms=5, lw=1.2,
                          capsize=2)
        if part.value.max() <= 1:
            axis.set_ylim(-0.02, 1.02)
        axis.set(**{"title": title, "xlabel": x, "xscale": "log", **axes_settings})
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.minorticks_off()
    key(figure, colours, marks, lines=True)
    return figure


def scatter(table: pd.DataFrame, x: str, y: str, panel: str, order: Sequence[str], **axes_settings):
    """One metric against another with 95 % intervals: a colour per defence, a marker per attack.

    Args:
        table: columns attack, label, `panel`, and `x` and `y` each with `_low` and `_high`.
        x, y: metrics.
        panel: column of the title of the panel.
        order: labels of the defences, in the order of the legend.
        axes_settings: of every panel, as `xlabel`.
    """
    parts = table.groupby(panel, sort=False)
    figure, axes = panels(parts.ngroups, parts.ngroups, 4.2, 3.7, extra=2.0, sharex=True, sharey=True)
    colours = palette([*(label for label in order if label in set(table.label)), *table.label])
    marks = {attack: marker(k) for k, attack in enumerate(dict.fromkeys(table.attack))}
    for axis, (title, part) in zip(axes[0], parts, strict=True):
        for (label, attack), rows in part.groupby(["label", "attack"], sort=False):
            axis.errorbar(rows[x], rows[y], xerr=errors(rows, x), yerr=errors(rows, y), color=colours[label],
                          marker=marks[attack], ls="", ms=7, lw=0.8, mec="white")
        axis.set(title=title, **axes_settings)
    axes[0, 0].set_ylabel(axes_settings.get("ylabel", y))
    key(figure, colours, marks)
    return figure


def histories(runs: dict[str, pd.DataFrame], x: str, columns: dict[str, str], shares: Iterable[str] = ()):
    """What training wrote down, a panel per column, a line per run.

    Args:
        runs: history by name of the run.
        x: column of the epoch or update.
        columns: title by column.
        shares: columns that lie between 0 and 1.
    """
    figure, axes = panels(len(columns), len(columns), 3.5, 3.0, extra=2.4)
    colours = palette(runs)
    for name, rows in runs.items():
        style = {"color": colours[name], "marker": "." if len(rows) < 20 else "", "lw": 1.2, "label": name}
        for axis, column in zip(axes[0], columns, strict=True):
            if column in rows and rows[column].notna().any():
                axis.plot(rows[x], rows[column], **style)
    for axis, (column, title) in zip(axes[0], columns.items(), strict=True):
        axis.set(title=title, xlabel=x)
        if column in shares:
            axis.set_ylim(0, 1.02)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def training_curves(runs: dict[str, pd.DataFrame]):
    """Loss, accuracy on clean and success on poisoned training samples against the epoch, a line per victim."""
    return histories(runs, "epoch", {"loss": "training loss", "acc": "accuracy, clean training samples",
                                     "acc_poisoned": "target hit, poisoned training samples"}, ("acc", "acc_poisoned"))
