"""The report of a paper on image classifiers: what any of them shows of ACC, ASR and RA."""

import numpy as np
import pandas as pd

from cupel.reporting import figures, tables
from cupel.reporting.figures import COLOURS, handle, plt
from cupel.reporting.paper import Paper, victim_histories
from cupel.rng import rng

KINDS = {"pruning": COLOURS[5], "tuning": COLOURS[1], "inversion": COLOURS[3]}
METRICS = ("asr", "acc", "ra")
PLACE = ["dataset", "model", "recipe"]


def prepared(paper: Paper) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells, named, and their means over seeds beside reported numbers."""
    own = tables.with_names(paper.cells, {"victim": "no defence", **paper.labels["defences"]})
    return own, tables.attach_reported(tables.summary(own), paper.reported)


def draw(paper: Paper) -> None:
    """Tables and figures for every data set, network, recipe and budget: nothing is averaged over these.

    `paper.labels` has `defences`; `paper.facts` has `kinds`: pruning, tuning or removal by added parts, by defence. Those
    without are in neither comparison.
    """
    own, table = prepared(paper)
    order = list(dict.fromkeys(["no defence", *paper.labels["defences"].values()]))
    sizes = {budget: size for budget, size in own.groupby("budget").clean_samples.max().items() if budget}
    paper.rows("cells", table.drop(columns="label"))
    clean = table[table.attack == "clean"]
    for (dataset, model, recipe), part in table[table.attack != "clean"].groupby(PLACE, sort=False):
        kinds = part.method.map(paper.facts["kinds"])
        for budget in dict.fromkeys(part.budget[part.budget != ""]):
            chosen = part.assign(kind=kinds)[part.budget.isin(["", budget])]
            stem, place = f"{dataset}_{model}_{recipe}_{budget}", (
                f"{dataset}, {model}, recipe {recipe}, budget {budget} ({sizes[budget]:g} clean images), {_seeds(part)}")
            where = f"{place}, scale {paper.scale}, up to {int(part.n.max())} test images a cell"
            _tables(paper, chosen, order, stem, where)
            costs = clean[(clean[[*PLACE, "budget"]] == [dataset, model, recipe, budget]).all(axis=1)]
            if len(costs):
                paper.table(f"clean_{stem}", tables.by_setting(costs, order, ("acc", "arr")), f"{paper.title}: what a defence "
                            f"costs a network without a backdoor, in percent ({where}).", "setting: defence")
            if chosen.value.notna().any():
                _figures(paper, chosen, order, stem, place)
            paper.table(f"sensitivity_{stem}", sensitivity(chosen, paper.facts["defences"]), f"{paper.title}: how much one "
                        f"hyperparameter decides, in percent ({where}).", "defence: hyperparameter")
        if part.budget.nunique() > 2:
            paper.figure(f"budgets_{dataset}_{model}_{recipe}", budget_curves(part[part.method != "victim"], sizes),
                         f"Sensitivity to the number of clean samples. ({dataset}, {model}, recipe {recipe}, {_seeds(part)})")
    if histories := victim_histories(own):
        paper.figure("training", figures.training_curves(histories), "Training of the victims: loss, accuracy on clean "
                     "samples, share of poisoned samples that hit the target.")


def sweeps(defences: dict[str, dict]) -> dict[tuple[str, str], dict[str, float]]:
    """Variants of one defence that differ in one number alone: label by (function, hyperparameter), values by method.

    Args:
        defences: `function` and all `settings` by method.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for method, entry in defences.items():
        function, settings = entry["function"], entry["settings"]
        base = defences[function]["settings"] if defences.get(function, {}).get("function") == function else {}
        differ = [key for key, value in settings.items() if base and value != base.get(key)]
        if len(differ) == 1 and {type(side.get(differ[0])) for side in (base, settings)} <= {int, float}:
            values = found.setdefault((function, differ[0]), {function: base[differ[0]]})
            values[method] = settings[differ[0]]
    return {key: dict(sorted(values.items(), key=lambda item: item[1])) for key, values in sorted(found.items())}


def sensitivity(table: pd.DataFrame, defences: dict[str, dict]) -> pd.DataFrame:
    """Rows: every value of a hyperparameter that variants of a defence sweep, then the spread over them; columns: ASR, ACC and
    RA in percent, means over the settings that all its values have, and how many these are."""
    rows = {}
    for (function, name), values in sweeps(defences).items():
        part = table[table.method.isin(values) & table.credited & table.metric.isin(METRICS)]
        grid = part.pivot_table(index=["attack", "attack_variant", "poison_rate", "metric"], columns="method", values="value")
        if len(grid.columns) < len(values) or (grid := grid.dropna()).empty:
            continue
        means = grid.groupby("metric").mean()
        settings = str(len(grid.index.droplevel("metric").unique()))
        shown = {f"{name} {value:g}": means[method] for method, value in values.items()}
        for text, rates in {**shown, f"{name}, spread": means.max(axis=1) - means.min(axis=1)}.items():
            rows[f"{function}: {text}"] = {
                **{metric.upper(): f"{100 * rates[metric]:.1f}" for metric in METRICS}, "settings": settings}
    return tables.frame(rows)


def _seeds(rows: pd.DataFrame) -> str:
    low, high = int(rows.seeds.min()), int(rows.seeds.max())
    return f"mean over {low} to {high} seeds" if low < high else f"mean over {high} seeds" if high > 1 else "one seed"


def _tables(paper: Paper, part: pd.DataFrame, order: list[str], stem: str, where: str) -> None:
    """Tables of a data set, network, recipe and budget."""
    known = "in cells.csv." if part.reported.notna().any() else "not known."
    for kind, grid, text, index in (
            ("acc_asr", tables.wide(part, order), "ACC and ASR", "defence"),
            ("ra", tables.wide(part, order, ("ra", "redirected")), "where triggered images go: to their class (RA), or to the "
             "one other class, neither theirs nor the target, that gets most of them (redirected),", "defence"),
            ("means", tables.means(part, order), "means over attacks and rates", "defence"),
            ("settings", tables.by_setting(part, order), "every setting with 95 % intervals of the finite test set",
             "setting: defence")):
        paper.table(f"{kind}_{stem}", grid, f"{paper.title}: {text} in percent ({where}). {tables.MARKS}. "
                                            f"The paper's own numbers: {known}", index)


def _figures(paper: Paper, part: pd.DataFrame, order: list[str], stem: str, place: str) -> None:
    """Figures of a data set, network, recipe and budget."""
    present = [label for label in order if label in set(part.label)]
    named = part.assign(panel=[tables.setting_name(row) for row in part.itertuples()])
    sides = tables.sideways(named, ["panel", "poison_rate", "method", "label"], METRICS)
    sides = sides.sort_values("poison_rate", ascending=False, kind="stable")
    scatter = figures.scatter(sides, "asr", "acc", "panel", present, xlabel="ASR (lower is better)",
                              ylabel="ACC (higher is better)")
    shown = {"scatter": (scatter, "Clean accuracy against attack success: good defences stand top left.")}
    # variants stand in the tables and above: with their bars none could be told from another
    plain = part[~part.method.str.contains("~")]
    for metric, text in (("asr", "Attack success rate by defence and poison rate."),
                         ("acc", "Clean accuracy by defence and poison rate."),
                         ("ra", "Recovery: triggered images that are given their true class again.")):
        shown[metric] = figures.bars_by_rate(plain, [label for label in present if label in set(plain.label)], metric), text
    known = plain[plain.credited & plain.value.notna()]
    if "redirected" in set(known.metric):
        shown["fates"] = figures.fates(known, [label for label in present if label in set(known.label)]), (
            "Where triggered images go: to the target, to the one other class that gets most, to their own, or elsewhere.")
    purified = part[(part.method != "victim") & part.credited]
    if purified.kind.nunique() > 1:
        shown["families"] = families(purified), ("Pruning against fine-tuning: a point is a setting, a bar the mean with "
                                                 "its 95 % interval over settings.")
        shown["recovery"] = recovery(purified), ("Recovery of triggered images, mean over settings with a 95 % bootstrap "
                                                 "interval; the cross is the mean ACC.")
    for kind, (figure, text) in shown.items():
        paper.figure(f"{kind}_{stem}", figure, f"{text} ({place})")


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
    return figures.with_numbers(figure, known)


def recovery(table: pd.DataFrame):
    """RA by defence, best first, over the settings that all of them have gone through; crosses are the mean ACC.

    Defences with less than half of the settings are left out.

    Args:
        table: as in `families`.
    """
    known = table[table.value.notna()]
    setting = ["attack", "attack_variant", "poison_rate"]
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
    return figures.with_numbers(figure, shared.reset_index())


def budget_curves(table: pd.DataFrame, sizes: dict[str, float]):
    """ASR, ACC and RA against the number of clean samples, a colour per defence, a marker per attack and rate.

    Args:
        table: as in `families`.
        sizes: clean samples by name of the budget.
    """
    part = table.assign(samples=table.budget.map(sizes), setting=[tables.setting_name(row) for row in table.itertuples()])
    several = part.groupby(["label", "setting"]).samples.transform("nunique") > 1
    return figures.lines(part[several], "samples", {metric: metric.upper() for metric in METRICS}, "label", "setting",
                         xlabel="clean samples")
