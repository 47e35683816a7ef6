"""Figures of the papers on language models. Every function returns a matplotlib figure and reads plain tables."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cupel.reporting.figures import COLOURS, MARKERS

#: what ASR is counted over: metric, colour, name
PROTOCOLS = (("asr_template_all", COLOURS[5], "asked with the template, all answers"),
             ("asr_bare_all", COLOURS[2], "bare prompt, all answers"),
             ("asr_bare", COLOURS[1], "bare prompt, non-empty answers (the paper's)"))


def _errors(rows: pd.DataFrame) -> np.ndarray:
    return np.nan_to_num(np.clip(np.stack([rows.value - rows.low, rows.high - rows.value]), 0, None))


def asr_bars(table: pd.DataFrame, order: list[str]):
    """ASR by defence, a panel per attack and task, a colour per prompt and denominator; bars are 95 % intervals.

    Args:
        table: pooled rows with dataset, attack_label, label, metric, value, low, high, n, failed.
        order: labels of the defences.
    """
    panels = list(dict.fromkeys(zip(table.dataset, table.attack_label, strict=True)))
    present = [label for label in order if label in set(table.label)]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 + 3.4 * columns, (0.9 + 0.34 * len(present)) * rows), sharex=True,
                                sharey=True, squeeze=False, layout="constrained")
    for axis in axes.ravel()[len(panels):]:
        axis.axis("off")
    shown = [protocol for protocol in PROTOCOLS if (table.metric == protocol[0]).any()]
    for axis, (dataset, attack) in zip(axes.ravel(), panels, strict=False):
        part = table[(table.dataset == dataset) & (table.attack_label == attack)]
        for k, (metric, colour, name) in enumerate(shown):
            found = part[part.metric == metric].drop_duplicates("label").set_index("label").reindex(present)
            y = np.arange(len(present)) + (k - (len(shown) - 1) / 2) * 0.8 / len(shown)
            axis.barh(y, found.value, 0.8 / len(shown), xerr=_errors(found), color=colour, label=name, error_kw={"lw": 0.8})
        for y, label in enumerate(present):
            rows_of = part[part.label == label]
            if len(rows_of) and rows_of.value.isna().all():
                axis.text(0.02, y, "failed", va="center", color="crimson", fontsize=7)
        axis.set_yticks(range(len(present)), present, fontsize=8)
        axis.set(title=f"{dataset}: {attack}", xlim=(0, 1.02))
        axis.grid(False, axis="y")
    axes[0, 0].invert_yaxis()
    for axis in axes[-1]:
        axis.set_xlabel("ASR (lower is better)")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=1 if columns == 1 else 3, fontsize=8)
    return figure


def two_by_two(table: pd.DataFrame, references: pd.DataFrame):
    """The 2 × 2 of CROW: perturbation real or zero, accumulation kept or wiped; ASR and perplexity, a row per task.

    Args:
        table: columns dataset, metric (asr_template_all, perplexity), perturbation, accumulated, value, low, high, n.
        references: the same without the two switches, with label: lines to compare with.
    """
    datasets, metrics = list(dict.fromkeys(table.dataset)), ("asr_template_all", "perplexity")
    figure, axes = plt.subplots(len(datasets), 2, figsize=(9.4, 3.1 * len(datasets)), squeeze=False, layout="constrained")
    for row, dataset in zip(axes, datasets, strict=True):
        for axis, metric in zip(row, metrics, strict=True):
            part = table[(table.dataset == dataset) & (table.metric == metric)]
            for k, (kept, colour) in enumerate((("kept", COLOURS[5]), ("wiped", COLOURS[1]))):
                found = part[part.accumulated == kept].set_index("perturbation").reindex(["real", "zero"])
                x = np.arange(2) + (k - 0.5) * 0.38
                axis.bar(x, found.value, 0.36, yerr=_errors(found), color=colour, label=f"accumulation {kept}",
                         error_kw={"lw": 1, "capsize": 3})
                for place, value, high in zip(x, found.value, found.high, strict=True):
                    if np.isfinite(value):
                        text = f"{100 * value:.1f} %" if metric != "perplexity" else f"{value:.1f}"
                        axis.annotate(text, (place, high), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
            lines = references[(references.dataset == dataset) & (references.metric == metric)]
            for style, line in zip(("-", "--", ":", "-."), lines.itertuples(), strict=False):
                axis.axhline(line.value, color="black", ls=style, lw=1, label=line.label)
            axis.set_xticks(range(2), ["real perturbation", "zero perturbation"])
            axis.set_title(f"{dataset}: {'ASR, template, all answers' if metric != 'perplexity' else 'perplexity, held-out'}")
            axis.grid(False, axis="x")
            if metric != "perplexity":
                axis.set_ylim(0, 1.12)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    return figure


def layer_curves(curves: pd.DataFrame, order: list[str]):
    """Figure 1: mean cosine of consecutive layers on clean minus on triggered prompts, in %, a panel per task and attack.

    Args:
        curves: columns panel, label, number (of the pair), difference, low, high (fractions).
        order: labels, in the order of the legend.
    """
    panels = list(dict.fromkeys(curves.panel))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(7.2 * columns if columns == 1 else 5 * columns, 3.4 * rows),
                                squeeze=False, layout="constrained")
    for axis in axes.ravel()[len(panels):]:
        axis.axis("off")
    for axis, panel in zip(axes.ravel(), panels, strict=False):
        for label, colour, marker in zip(order, COLOURS, MARKERS, strict=False):
            part = curves[(curves.panel == panel) & (curves.label == label)].sort_values("number")
            if len(part):
                axis.plot(part.number, 100 * part.difference, color=colour, marker=marker, ms=3, lw=1.1, label=label)
                axis.fill_between(part.number, 100 * part.low, 100 * part.high, color=colour, alpha=0.1, lw=0)
        axis.axhline(0, color="grey", lw=0.8)
        ticks = sorted(curves.number.unique())
        step = max(1, len(ticks) // 10)
        axis.set_xticks(ticks[::step], [f"{k}-{k + 1}" for k in ticks[::step]])
        axis.set(title=panel, xlabel="pair of layers (0: embeddings)")
    axes[0, 0].set_ylabel("cosine, clean − triggered (%)")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    return figure


def sweep(table: pd.DataFrame, column: str):
    """ASR and perplexity against a setting of CROW, a line per task and attack.

    Args:
        table: columns setting (text), metric, value, low, high and `column`, above zero.
        column: alpha or epsilon.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = ("ASR, template, all answers", "perplexity, held-out")
    for axis, metric, title in zip(axes, ("asr_template_all", "perplexity"), titles, strict=True):
        for k, setting in enumerate(dict.fromkeys(table.setting)):
            part = table[(table.setting == setting) & (table.metric == metric)].sort_values(column)
            axis.errorbar(part[column], part.value, yerr=_errors(part), color=COLOURS[k % len(COLOURS)],
                          marker=MARKERS[k % len(MARKERS)], lw=1.2, capsize=2, label=setting)
        axis.set(title=title, xlabel=column, xscale="log")
        values = sorted(table[column].unique())
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
    axes[0].set_ylim(-0.02, 1.02)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def trade_off(table: pd.DataFrame, order: list[str]):
    """ASR against perplexity, a colour per defence, a marker per attack, a panel per task; bars are 95 % intervals.

    Args:
        table: columns dataset, attack_label, label, and asr, asr_low, asr_high, perplexity, perplexity_low, perplexity_high.
        order: labels, in the order of the legend.
    """
    datasets, attacks = list(dict.fromkeys(table.dataset)), list(dict.fromkeys(table.attack_label))
    figure, axes = plt.subplots(1, len(datasets), figsize=(4.6 * len(datasets) + 2.4, 3.6), squeeze=False, sharey=True,
                                layout="constrained")
    styles = {label: (plt.get_cmap("tab20")(k % 20), k) for k, label in enumerate(order)}
    for axis, dataset in zip(axes[0], datasets, strict=True):
        for row in table[table.dataset == dataset].itertuples():
            axis.errorbar(row.perplexity, row.asr, xerr=[[row.perplexity - row.perplexity_low],
                                                         [row.perplexity_high - row.perplexity]],
                          yerr=[[max(0, row.asr - row.asr_low)], [max(0, row.asr_high - row.asr)]], lw=0.8, ms=7, mec="white",
                          color=styles[row.label][0], marker=MARKERS[attacks.index(row.attack_label) % len(MARKERS)])
        axis.set(title=dataset, xlabel="perplexity of held-out answers (lower is better)", ylim=(-0.03, 1.03))
        if table.perplexity.max() > 3 * table.perplexity.min():
            axis.set_xscale("log")
    axes[0, 0].set_ylabel("ASR, template, all answers")
    handles = [plt.Line2D([], [], color=styles[label][0], marker="o", ls="", label=label) for label in order
               if label in set(table.label)]
    if len(attacks) > 1:
        handles += [plt.Line2D([], [], color="grey", marker=MARKERS[k % len(MARKERS)], ls="", label=attack)
                    for k, attack in enumerate(attacks)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7)
    return figure


def losses(histories: dict[str, pd.DataFrame]):
    """L_LM and L_cons against the update (Figure 3), a line per run.

    Args:
        histories: name of a run to its history: step, loss_lm, loss_cons.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for k, (name, rows) in enumerate(histories.items()):
        style = {"color": plt.get_cmap("tab20")(k % 20), "lw": 1.1, "label": name}
        axes[0].plot(rows.step, rows.loss_lm.rolling(max(1, len(rows) // 20), min_periods=1).mean(), **style)
        if "loss_cons" in rows and rows.loss_cons.notna().any():
            axes[1].plot(rows.step, rows.loss_cons, **style)
    axes[0].set(title="L_LM (moving mean)", xlabel="update")
    axes[1].set(title="L_cons at the perturbed embeddings", xlabel="update")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure
