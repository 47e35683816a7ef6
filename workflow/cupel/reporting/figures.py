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
