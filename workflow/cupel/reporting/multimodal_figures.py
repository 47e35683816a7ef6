"""Figures of the papers on multimodal models. Every function returns a matplotlib figure and reads plain arrays or tables."""

import numpy as np
import pandas as pd

from cupel.reporting.figures import COLOURS, MARKERS, plt

CLEAN, POISONED, BOTH = COLOURS[5], COLOURS[6], COLOURS[0]


def shown_layers(count: int, most: int = 5) -> list[int]:
    """Up to `most` layers, evenly spread, the first and the last among them."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(most, count))})


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def attention_maps(rows: list[dict], layers: list[int]):
    """Attention over the picture: a row per picture, a column per layer, the picture itself first.

    Args:
        rows: dicts with `title`, `picture` uint8 [H, W, 3], `maps` float [L, R, C] (each sums to 1) and `trigger` (bool).
        layers: those shown.
    """
    figure, axes = plt.subplots(len(rows), len(layers) + 1, figsize=(1.5 * (len(layers) + 1) + 1.2, 1.62 * len(rows) + 0.3),
                                squeeze=False, layout="constrained")
    for line, row in zip(axes, rows, strict=True):
        height, width = row["picture"].shape[:2]
        line[0].imshow(row["picture"], interpolation="nearest")
        line[0].set_ylabel(row["title"], rotation=0, ha="right", va="center", fontsize=8)
        grey = np.repeat(row["picture"].mean(-1, keepdims=True), 3, -1).astype(np.uint8)
        for axis, layer in zip(line[1:], layers, strict=True):
            p = row["maps"][layer]
            axis.imshow(grey, interpolation="nearest")
            # each map has its own scale: where attention goes, not how much of it goes to the picture
            axis.imshow(p, cmap="inferno", alpha=0.75, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            axis.set_xlabel(f"H = {_entropy(p):.2f}", fontsize=7, labelpad=1, color=POISONED if row["trigger"] else CLEAN)
    for axis, title in zip(axes[0], ["picture", *(f"layer {layer}" for layer in layers)], strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return figure


def trigger_sheet(clean: np.ndarray, stamped: dict[str, np.ndarray], amplify: int = 10):
    """Pictures without and with each trigger, a row per trigger; in the last column the amplified difference.

    Args:
        clean: uint8 [N, H, W, 3].
        stamped: name of the trigger to uint8 [N, H, W, 3].
        amplify: factor of the difference, shown around grey.
    """
    rows = {"clean": clean, **stamped}
    figure, axes = plt.subplots(len(rows), len(clean) + 1, figsize=(len(clean) + 3.2, 1.02 * len(rows)), squeeze=False,
                                layout="constrained")
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        difference = np.clip(128 + amplify * (pictures[-1].astype(int) - clean[-1]), 0, 255).astype(np.uint8)
        for axis, picture in zip(line, [*pictures, difference], strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axes[0, -1].set_title("difference", fontsize=8)
    return figure


def _bell(x: np.ndarray, mean: float, sd: float) -> np.ndarray:
    return np.exp(-(((x - mean) / sd) ** 2) / 2) / (sd * np.sqrt(2 * np.pi))


def entropy_histograms(panels: list[dict], columns: int = 4):
    """Entropies of training samples, clean and poisoned by the truth, with the fitted mixture.

    Args:
        panels: dicts with `title`, `values` float [N], `poisoned` bool [N] and `mixture`: a record with mean, sd and weight of
            two components, or None.
        columns: panels in a row.
    """
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.5 * lines), squeeze=False, layout="constrained")
    for axis in axes.ravel()[len(panels):]:
        axis.axis("off")
    for axis, panel in zip(axes.ravel(), panels, strict=False):
        values, poisoned = panel["values"], panel["poisoned"]
        edges = np.histogram_bin_edges(values, 60)
        width = edges[1] - edges[0]
        # counts of both kinds on one scale; the rare kind is drawn over the other
        axis.hist(values[~poisoned], edges, color=CLEAN, alpha=0.55, label="clean")
        axis.hist(values[poisoned], edges, color=POISONED, alpha=0.75, label="poisoned")
        mixture = panel["mixture"]
        if mixture and mixture["mean"]:
            x = np.linspace(edges[0], edges[-1], 400)
            parts = [len(values) * width * weight * _bell(x, mean, sd)
                     for mean, sd, weight in zip(mixture["mean"], mixture["sd"], mixture["weight"], strict=True)]
            axis.plot(x, sum(parts), color=BOTH, lw=1, label="mixture")
            for part, style in zip(parts, ("--", ":"), strict=True):
                axis.plot(x, part, color=BOTH, lw=0.9, ls=style)
        axis.set_title(panel["title"], fontsize=8)
        axis.set_xlabel("entropy (nats)", fontsize=8)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
    axes[0, 0].legend(fontsize=7)
    axes[0, 0].set_ylabel("training samples")
    return figure


def layer_separation(settings: dict[str, list[dict]], tau: float):
    """Separation of the two components in every layer, by both formulas, and how well low entropy tells poisoned samples.

    Args:
        settings: title to one dict per layer with `layer`, `bsi_rss`, `bsi_sum` and `auroc` (or None).
        tau: threshold of both tests.
    """
    figure, axes = plt.subplots(len(settings), 2, figsize=(9, 2.6 * len(settings)), squeeze=False, layout="constrained")
    for (left, right), (title, layers) in zip(axes, settings.items(), strict=True):
        x = np.array([layer["layer"] for layer in layers])
        for k, (key, label) in enumerate((("bsi_rss", "|Δμ| / √(σ₁² + σ₂²) (paper)"), ("bsi_sum", "|Δμ| / (σ₁ + σ₂) (code)"))):
            left.bar(x + 0.4 * (k - 0.5), [layer[key] for layer in layers], 0.4, color=(COLOURS[2], COLOURS[5])[k], label=label)
        left.axhline(tau, color=POISONED, lw=1, ls="--", label=f"τ = {tau:g}: above it a layer is sensitive")
        ticks = x if len(x) < 17 else x[::4]
        left.set(xlabel="layer", ylabel="separation", ylim=(0, max(1.15 * tau, left.get_ylim()[1])), xticks=ticks)
        left.set_title(title, fontsize=9)
        known = [layer for layer in layers if layer["auroc"] is not None]
        right.plot([layer["layer"] for layer in known], [layer["auroc"] for layer in known], color=CLEAN, marker="o")
        right.axhline(0.5, color="grey", lw=0.8, ls=":")
        right.set(xlabel="layer", ylabel="AUROC of low entropy", ylim=(0, 1.03), xticks=ticks)
        if not known:
            right.text(0.5, 0.5, "no poisoned samples", transform=right.transAxes, ha="center")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def f1_bars(table: pd.DataFrame, order: list[str]):
    """F1 of every filter, a panel per setting, with precision and recall as marks.

    Args:
        table: columns setting, label, metric (f1, precision, recall), value.
        order: labels of the filters.
    """
    settings = list(dict.fromkeys(table.setting))
    figure, axes = plt.subplots(1, len(settings), figsize=(4.2 * len(settings) + 2, 0.34 * len(order) + 1.3), sharey=True,
                                squeeze=False, layout="constrained")
    places = np.arange(len(order))
    for axis, setting in zip(axes[0], settings, strict=True):
        grid = table[table.setting == setting].pivot_table(index="label", columns="metric", values="value").reindex(order)
        axis.barh(places, grid.get("f1", pd.Series(np.nan, order)), color=CLEAN, alpha=0.6, label="F1")
        for metric, marker in (("precision", "o"), ("recall", "|")):
            if metric in grid:
                axis.plot(grid[metric], places, ls="", marker=marker, color=BOTH, ms=5 if marker == "o" else 11, label=metric)
        axis.set(title=setting, xlim=(0, 1.02), xlabel="fraction")
    axes[0, 0].set_yticks(places, order)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def dose_response(points: pd.DataFrame):
    """ASR against the poisoned samples that are left for fine-tuning: a line through the oracle's doses, marks for the rest.

    Args:
        points: columns setting, label, oracle (bool), left, asr, asr_low, asr_high.
    """
    settings = list(dict.fromkeys(points.setting))
    figure, axes = plt.subplots(1, len(settings), figsize=(4.6 * len(settings) + 1.8, 3.4), sharey=True, squeeze=False,
                                layout="constrained")
    others = list(dict.fromkeys(points.label[~points.oracle]))
    for axis, setting in zip(axes[0], settings, strict=True):
        rows = points[points.setting == setting]
        doses = rows[rows.oracle].sort_values("left")
        _dose(axis, doses, color=BOTH, marker=".", lw=1.1, label="oracle, by recall")
        for k, label in enumerate(others):
            part = rows[rows.label == label]
            if len(part):
                colour = COLOURS[1 + k % (len(COLOURS) - 1)]
                _dose(axis, part, color=colour, marker=MARKERS[k % len(MARKERS)], ls="", label=label)
        axis.set_xscale("symlog", linthresh=1)
        axis.set(title=setting, xlabel="poisoned samples left", ylim=(-0.02, 1.05),
                 xlim=(-0.2, 1.6 * max(1, points.left.max())))
    axes[0, 0].set_ylabel("ASR")
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure


def _dose(axis, rows: pd.DataFrame, **style) -> None:
    errors = np.clip([rows.asr - rows.asr_low, rows.asr_high - rows.asr], 0, None)
    axis.errorbar(rows.left, rows.asr, yerr=errors, capsize=2, ms=6, **style)
