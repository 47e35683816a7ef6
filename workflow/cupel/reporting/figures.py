"""What all figures share: colours, style, panels, error bars, and the few figures that more than one paper draws."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cupel.files import atomic, write_text
from cupel.reporting.tables import attack_name, setting_name

# Okabe and Ito's colours, which stay apart for colour-blind readers
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
MARKERS = "osD^vP*Xd<>h"

plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 130, "font.size": 9, "axes.spines.top": False, "svg.hashsalt": "cupel",
                     "axes.spines.right": False, "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.25})

#: colour and marker of each defence of a family, by its name for people: see `register`
LOOKS: dict[str, tuple[str, str]] = {}
#: what stands for no defence
PLAIN = ("no defence", "base model", "victim")


def register(labels: Iterable[str]) -> None:
    """Give every defence of a family its colour and marker, which are the same in every figure.

    Args:
        labels: all that the family knows, also those that a run has not, in the order of their files.
    """
    LOOKS.clear()
    LOOKS.update(styles(dict.fromkeys(labels)))
    LOOKS.update(dict.fromkeys(PLAIN, ("#000000", "X")))


def save(figure, path) -> None:
    """Write a figure atomically, and beside it as CSV the numbers that it was given, and close it. The same
    figure gives the same file."""
    path = Path(path)
    with atomic(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", format=path.suffix[1:],
                       metadata={"Date": None} if path.suffix == ".svg" else None)
    if hasattr(figure, "numbers"):
        write_text(path.with_suffix(".csv"), figure.numbers.to_csv(index=False))
    plt.close(figure)


def with_numbers(figure, table: pd.DataFrame):
    """The figure, which knows the numbers that it shows."""
    figure.numbers = table
    return figure


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name: that of `register`, or the next that is free, no two alike for the first 72.
    Black is left to what is no defence, and yellow is too pale for a line on white."""
    names = list(dict.fromkeys(names))
    looks = {name: LOOKS[name] for name in names if name in LOOKS}
    colours, taken = [COLOURS[k] for k in (5, 1, 3, 6, 2, 7)], set(looks.values())
    free = [(colour, mark) for mark in MARKERS for colour in colours if (colour, mark) not in taken]
    others = [name for name in names if name not in looks]
    looks |= {name: free[k % len(free)] for k, name in enumerate(others)}
    return {name: looks[name] for name in names}


def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, see `styles`."""
    return {name: colour for name, (colour, _) in styles(names).items()}


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


def picture_rows(rows: Iterable[tuple[str, Sequence[np.ndarray]]], width: float, height: float, top: Sequence[str] = ()):
    """Rows of pictures, each with its title on the left.

    Args:
        rows: title and pictures [H, W], [H, W, 1] or [H, W, 3], uint8 or float in [0, 1].
        width, height: of a picture, inches.
        top: titles of columns.

    Returns:
        The figure, and its axes [rows, columns].
    """
    rows = list(rows)
    count = max(len(images) for _, images in rows)
    figure, axes = panels(len(rows) * count, count, width, height, extra=1.0)
    bare(axes)
    for line, (title, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1,
                        interpolation="nearest")
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    for axis, title in zip(axes[0], top, strict=False):
        axis.set_title(title, fontsize=8)
    return figure, axes


def signed(values: np.ndarray, largest: float) -> np.ndarray:
    """Numbers [...] between ± `largest` as colours [..., 3], red where positive."""
    return plt.get_cmap("RdBu_r")(0.5 + values / (2 * largest))[..., :3]


def errors(rows: pd.DataFrame, name: str = "") -> np.ndarray:
    """Lengths [2, N] of error bars, from the columns value, low and high, or `<name>` with `<name>_low` and `<name>_high`;
    0 where there are no bounds."""
    value = rows[name or "value"]
    low, high = (rows.get(f"{name}_{end}" if name else end, value) for end in ("low", "high"))
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


def amplified(stamped: np.ndarray, clean: np.ndarray) -> tuple[np.ndarray, int]:
    """The difference of uint8 pictures around grey, and how many times as large: up to 10, while nothing saturates."""
    difference = stamped.astype(int) - clean.astype(int)
    factor = int(np.clip(127 // max(1, np.abs(difference).max()), 1, 10))
    return np.clip(128 + factor * difference, 0, 255).astype(np.uint8), factor


def bars(table: pd.DataFrame, order: Sequence[str], colours: dict[str, str], *, lying: bool = False, most: int = 3,
         sharey: bool = True, **axes_settings):
    """Groups of bars with 95 % intervals; where a value is missing they say why: a failed cell, or one that was not run.

    Args:
        table: columns panel (title), group (text), label, value and failed; low and high if known.
        order: labels.
        colours: by group, in the order of the legend.
        lying: whether bars go from left to right.
        most: panels in a row.
        sharey: whether panels have one scale.
        axes_settings: of every panel, as `xlabel`.
    """
    parts = table.groupby("panel", sort=False)
    size = (3.4, 0.9 + 0.34 * len(order)) if lying else (max(4.4, 0.3 * len(order)), 3.3)
    figure, axes = panels(parts.ngroups, most, *size, extra=3.2 if lying else 0, sharex=lying, sharey=sharey)
    places = np.arange(len(order))
    for axis, (title, part) in zip(axes.ravel(), parts, strict=False):
        groups = [group for group in colours if group in set(part.group)]
        for k, group in enumerate(groups):
            rows = part[part.group == group].drop_duplicates("label").set_index("label").reindex(order)
            where, thick = places + (k - (len(groups) - 1) / 2) * 0.8 / len(groups), 0.8 / len(groups)
            draw, bounds = (axis.barh, "xerr") if lying else (axis.bar, "yerr")
            draw(where, rows.value, thick, color=colours[group], error_kw={"lw": 0.8}, **{bounds: errors(rows)})
            for place, failed in zip(where[rows.value.isna()], rows.failed[rows.value.isna()] > 0, strict=True):
                axis.text(*((0.02, place) if lying else (place, 0.02)), "failed" if failed else "not run", fontsize=7,
                          rotation=0 if lying else 90, color="crimson" if failed else "dimgrey",
                          ha="left" if lying else "center", va="center" if lying else "bottom")
        axis.set(title=title, **axes_settings)
        if not part.value.max() > 1:
            axis.set(**{"xlim" if lying else "ylim": (0, 1.02)})
        if lying:
            axis.set_yticks(places, order, fontsize=8)
        else:
            axis.set_xticks(places, order, rotation=35 if len(order) > 2 else 0, ha="right" if len(order) > 2 else "center")
        axis.grid(False, axis="y" if lying else "x")
    if lying:
        axes[0, 0].invert_yaxis()
    if len(colours) > 1:
        figure.legend(handles=[handle(group, color=colour, lw=5) for group, colour in colours.items()], fontsize=8,
                      loc="outside lower center", ncols=3 if parts.ngroups > 1 else 1)
    return with_numbers(figure, table)


def bars_by_rate(table: pd.DataFrame, order: Sequence[str], metric: str):
    """A metric of `cupel.reporting.tables.summary` by defence and poison rate, a panel per attack."""
    rows = table[table.metric == metric]
    rows = rows.assign(panel=[attack_name(row) for row in rows.itertuples()])
    rows["group"] = "poison rate " + (100 * rows.poison_rate).map("{:g} %".format)
    groups = rows.sort_values("poison_rate", ascending=False).group.unique()
    colours = dict(zip(groups, [COLOURS[k] for k in (5, 1, 3, 6, 2, 7)], strict=False))
    figure = bars(rows, order, colours, most=4)
    figure.axes[0].set_ylabel(metric.upper())
    return figure


#: where triggered images go, by metric: what the legend says, and a colour
FATES = {"asr": ("the target", COLOURS[6]), "redirected": ("one other class", COLOURS[1]),
         "ra": ("their own class", COLOURS[3]), "rest": ("other classes", "#bbbbbb")}


def fates(table: pd.DataFrame, order: Sequence[str]):
    """Stacked shares of triggered images by where they go (`FATES`), a bar per defence, a panel per setting.

    Args:
        table: `cupel.reporting.tables.summary` with asr, redirected and ra of one data set, network, recipe and budget.
        order: labels.
    """
    names = [setting_name(row) for row in table.itertuples()]
    grid = table.assign(panel=names).pivot_table(index=["panel", "label"], columns="metric", values="value", sort=False)
    grid = grid.reindex(columns=["asr", "redirected", "ra"]).dropna()
    grid["rest"] = (1 - grid.sum(axis=1)).clip(lower=0)
    colours = [colour for _, colour in FATES.values()]
    places = list(dict.fromkeys(grid.index.get_level_values("panel")))
    figure, axes = panels(len(places), 3, 3.2, 0.8 + 0.26 * len(order), extra=1.2, sharex=True, sharey=True)
    for axis, place in zip(axes.ravel(), places, strict=False):
        part = grid.loc[place].reindex(order)
        part[list(FATES)].plot.barh(stacked=True, ax=axis, color=colours, width=0.8, legend=False)
        axis.set(title=place, ylabel="", xlim=(0, 1))
        axis.grid(False, axis="y")
    axes[0, 0].invert_yaxis()
    figure.supxlabel("share of triggered test images", fontsize=9)
    figure.legend(handles=[handle(name, color=colour, lw=5) for name, colour in FATES.values()], fontsize=8,
                  loc="outside upper center", ncols=4)
    return with_numbers(figure, grid.reset_index())


def lines(table: pd.DataFrame, x: str, metrics: dict[str, str], colour: str, marked: str | None = None, *,
          ticks: dict[float, str] | None = None, bands: bool = False, **axes_settings):
    """Metrics against a number, a panel each, with 95 % intervals.

    Args:
        table: columns metric and value, those named here, and low and high if known.
        x: column of the number.
        metrics: title of the panel by metric.
        colour, marked: columns that tell lines apart, by colour and by marker.
        ticks: texts at values of x; None: all numbers; empty: as matplotlib sets them.
        bands: whether intervals are bands.
        axes_settings: of every panel, as `xlabel`.
    """
    figure, axes = panels(len(metrics), 4, 3.4 if len(metrics) > 1 else 4.6, 3.4, extra=1.8)
    colours = palette(table[colour])
    marks = (dict(zip(dict.fromkeys(table[marked]), itertools.cycle(MARKERS), strict=False)) if marked
             else {name: mark for name, (_, mark) in styles(table[colour]).items()})
    if ticks is None:
        ticks = {value: f"{value:,.6g}" if value < 1e6 else f"{value:,.0f}" for value in sorted(set(table[x]))}
    for axis, (metric, title) in zip(axes.ravel(), metrics.items(), strict=False):
        part = table[table.metric == metric].sort_values(x, kind="stable")
        for name, rows in part.groupby([colour, marked or colour], sort=False):
            # two points are no curve
            style = {"color": colours[name[0]], "marker": marks[name[1]], "lw": 1.2, "ls": "-" if len(rows) > 2 else ""}
            if bands:
                axis.plot(rows[x], rows.value, ms=3, **style)
                axis.fill_between(rows[x], rows.low, rows.high, color=colours[name[0]], alpha=0.1, lw=0)
            else:
                axis.errorbar(rows[x], rows.value, yerr=errors(rows), ms=5, capsize=2, **style)
        if not bands and "ylim" not in axes_settings and part.value.max() <= 1:
            axis.set_ylim(-0.02, 1.02)
        axis.set(**{"title": title, "xlabel": x, "xscale": "log", **axes_settings})
        if ticks:
            axis.set_xticks(list(ticks), list(ticks.values()))
            axis.minorticks_off()
    alike = list(colours) == list(marks)
    handles = [handle(name, color=hue, marker=marks[name] if alike else "") for name, hue in colours.items()]
    handles += [] if alike else [handle(name, color="grey", marker=mark, ls="") for name, mark in marks.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return with_numbers(figure, table)


def scatter(table: pd.DataFrame, x: str, y: str, panel: str, order: Sequence[str], *, xlabel: str, ylabel: str,
            **axes_settings):
    """One metric against another with 95 % intervals: a colour and a marker per defence, a panel per setting.

    Args:
        table: columns label, `panel`, `x` and `y`, and `_low` and `_high` of those that have an interval; one row a point.
        x, y: metrics.
        panel: column of the title of the panel.
        order: labels of the defences, in the order of the legend.
        xlabel, ylabel: of the figure.
        axes_settings: of every panel, as `xlim`.
    """
    parts = table.groupby(panel, sort=False)
    figure, axes = panels(parts.ngroups, 3, 3.4, 3.0, extra=1.6, sharex=True, sharey=True)
    looks = styles([*(label for label in order if label in set(table.label)), *table.label])
    for axis, (title, part) in zip(axes.ravel(), parts, strict=False):
        for row in part.to_dict("records"):
            colour, mark = looks[row["label"]]
            one = pd.DataFrame([row])
            axis.errorbar([row[x]], [row[y]], xerr=errors(one, x), yerr=errors(one, y), color=colour, marker=mark, ls="", ms=7,
                          lw=0.8, mec="white", mew=0.5, clip_on=False)
        axis.set(title=title, **axes_settings)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    handles = [handle(label, color=colour, marker=mark, ls="") for label, (colour, mark) in looks.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return with_numbers(figure, table)


def histories(runs: dict[str, pd.DataFrame], x: str, columns: dict[str, str], shares: Iterable[str] = ()):
    """What training wrote down against x, its column of the epoch or update: a panel per column (titles by name), a line
    per run. The columns `shares` lie between 0 and 1."""
    figure, axes = panels(len(columns), len(columns), 3.5, 3.0, extra=2.4)
    colours = palette(runs)
    for axis, (column, title) in zip(axes[0], columns.items(), strict=True):
        for name, rows in runs.items():
            if column in rows and rows[column].notna().any():
                mark = "." if len(rows) < 20 else ""
                axis.plot(rows[x], rows[column], color=colours[name], marker=mark, lw=1.2, label=name)
        axis.set(title=title, xlabel=x)
        axis.xaxis.get_major_locator().set_params(integer=True)  # there is no half an epoch
        if len({value for rows in runs.values() for value in rows[x]}) == 1:
            axis.set_xlim(axis.get_xlim()[0] - 0.5, axis.get_xlim()[1] + 0.5)
        if column in shares:
            axis.set_ylim(0, 1.02)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return with_numbers(figure, pd.concat([rows.assign(run=name) for name, rows in runs.items()]))


def training_curves(runs: dict[str, pd.DataFrame]):
    """Loss, accuracy on clean and success on poisoned training samples against the epoch, a line per victim."""
    return histories(runs, "epoch", {"loss": "training loss", "acc": "accuracy, clean training samples",
                                     "acc_poisoned": "target hit, poisoned training samples"}, ("acc", "acc_poisoned"))
