"""Every defence beside every other, over all attacks and all papers: quality, cost, ranks, and the fronts between them.

A *setting* is a data set, network, recipe, attack, poison rate and clean budget; a defence has one entry per setting, the
mean over seeds. Rates are fractions. Means over settings, and ranks, are taken only over settings that all defences
compared have gone through (`comparable`): a mean over other settings says more about the settings than about the defence.
Settings of victims without a backdoor are in neither, and a defence that destroyed a network counts as failed there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from cupel.evaluation.settings import SETTING, VICTIM, validity
from cupel.files import write_json, write_text
from cupel.reporting.figures import COLOURS, errors, handle, nothing, plt, register, save, styles, with_numbers
from cupel.reporting.page import navigation, write_page
from cupel.reporting.paper import about
from cupel.reporting.tables import METRICS, attack_name, setting_name, with_names
from cupel.rng import rng as stream

COSTS = ["seconds", "clean_samples", "peak_memory_mb", "peak_vram_mb"]
#: of the bootstrap of ranks
DRAWS = 10_000
COLUMNS = [*SETTING, "method", "label", *METRICS, "acc_victim", "asr_victim", *COSTS, "seeds", "planned", "failed",
           "failed_seeds", "credited", "destroyed", "unchanged", "reason", "papers"]


def cross_table(cells: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """One row per setting and defence, with the columns `COLUMNS`.

    Rates, costs and the victim's rates are means over the seeds that have a result. `seeds` of the `planned` seeds have
    one; `failed` says that one of them has none, `reason` why. `credited`: all victims have their backdoor; `destroyed`: one
    of the networks is, `unchanged`: one is its victim to the bit (`cupel.evaluation.settings.validity`). `failed_seeds`
    counts those that are the defence's own failure: not those that have not run, nor those whose victim failed. A cell that
    two papers use is counted once.

    Args:
        cells: the tidy table (`cupel.reporting.tables.gather`).
        labels: names for people, by defence.

    Raises:
        ValueError: the tidy table lacks a column.
    """
    lacking = [c for c in [*SETTING, *COSTS, "stage", "seed", "path", "paper", "metric", "value", "status", "reason"]
               if c not in cells]
    if lacking:
        raise ValueError(f"the tidy table lacks the columns {', '.join(lacking)}: make cells.parquet again")
    cells = validity(cells).rename(columns={"implanted": "credited"})
    once = cells.drop_duplicates("path").set_index("path")
    values = cells.drop_duplicates(["path", "metric"]).pivot(index="path", columns="metric", values="value")
    once = once.drop(columns=["metric", "value"]).join(values.reindex(columns=list(METRICS)))
    once["papers"] = cells.groupby("path").paper.unique().map(sorted)

    victims = once[once.stage == "victim"].drop_duplicates([*VICTIM, "seed"])
    victims = victims[[*VICTIM, "seed", "acc", "asr", "status"]]
    runs = with_names(once[once.stage == "purified"], labels)
    runs = runs.merge(victims, how="left", on=[*VICTIM, "seed"], suffixes=("", "_victim"))
    if runs.empty:
        return pd.DataFrame(columns=COLUMNS)
    namesakes = runs.groupby("label").method.transform("nunique") > 1
    runs["label"] += np.where(namesakes, " (" + runs.method + ")", "")
    runs["failed"] = runs.status != "ok"
    runs["failed_seeds"] = (runs.status == "failed") & (runs.status_victim != "failed")

    keys = [*SETTING, "method", "label"]
    means = [*METRICS, "acc_victim", "asr_victim", *COSTS]
    groups = runs.groupby(keys, dropna=False, sort=False)
    table = groups.agg(planned=("seed", "nunique"), seeds=("failed", lambda failed: int((~failed).sum())),
                       failed=("failed", "any"), failed_seeds=("failed_seeds", "sum"),
                       credited=("credited", "all"), destroyed=("destroyed", "any"), unchanged=("unchanged", "any"),
                       papers=("papers", lambda lists: ", ".join(sorted({p for papers in lists for p in papers}))),
                       reason=("reason", lambda reasons: "; ".join(dict.fromkeys(r for r in reasons if r))))
    # the victim's rates are those of the same seeds, so that a loss is a paired difference
    paired = runs.loc[~runs.failed].groupby(keys, dropna=False, sort=False)[means].mean()
    table = table.join(paired.combine_first(groups[means].mean())).reset_index()
    table["place"] = table.groupby(SETTING, dropna=False, sort=False).ngroup()
    return table.sort_values(["place", "der"], ascending=[True, False], kind="stable")[COLUMNS].reset_index(drop=True)


def _block(present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Defences and settings, as indices, of a complete block of a bool array [settings, defences], as large as possible.

    Candidates are the sets of defences found in one setting, or common to two; the product of defences and settings
    decides, then the number of settings. Two defences at least.
    """
    patterns = np.unique(present, axis=0)
    pairs = (patterns[:, None] & patterns[None]).reshape(-1, present.shape[1])
    candidates = np.unique(pairs, axis=0)[::-1]
    sizes = candidates.sum(1)
    held = candidates.astype(int) @ present.T.astype(int) == sizes[:, None]
    areas = np.where(sizes >= 2, sizes * held.sum(1), 0)
    if not areas.any():
        return np.array([], int), np.array([], int)
    best = np.lexsort((-held.sum(1), -areas))[0]
    return np.flatnonzero(candidates[best]), np.flatnonzero(held[best])


def _bad(cross: pd.DataFrame) -> pd.Series:
    """Rows of a defence that failed, or destroyed what it was given."""
    return (cross.failed_seeds > 0) | cross.destroyed


def comparable(cross: pd.DataFrame, failures: bool = True) -> pd.DataFrame:
    """Rows of the largest set of settings × defences without a gap: each defence has a DER in each setting.

    With `failures`, for ranks, a defence that failed has one, too; without, for means, a failure is a gap. A defence
    that has gaps in many settings would take these settings from all others; it is left out where that makes
    defences × settings larger.
    """
    rows = cross[cross.credited & np.where(_bad(cross), failures, cross.der.notna())]
    if rows.empty:
        return rows
    settings, names = rows.groupby(SETTING, dropna=False, sort=False).ngroup(), pd.factorize(rows.method)[0]
    methods, chosen = _block(pd.crosstab(settings.to_numpy(), names).to_numpy() > 0)
    return rows[settings.isin(chosen).to_numpy() & np.isin(names, methods)]


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of defences.

    Attributes:
        table: method, label, rank, low, high (95 %), mean (DER where the defence did not fail), failed
            (settings in which it failed), settings; best first.
        settings: how many settings the ranks are over.
        victims: how many victims these settings have.
        not_ranked: method, label, settings: defences left out, and in how many settings they have a value or failed.
    """

    table: pd.DataFrame
    settings: int
    victims: int
    not_ranked: pd.DataFrame


def ranks(cross: pd.DataFrame, rng: np.random.Generator) -> Ranking:
    """Mean rank by DER of each defence over the settings of `comparable`: 1 is best, ties share the mean of their ranks.

    A defence that failed in a setting, with any seed, ranks below all that did not; several share the last ranks. The
    interval is a bootstrap over settings, in which settings of one victim (its budgets) stay together; it is NaN for one
    victim, of which nothing can be said about others.
    """
    block = comparable(cross)
    grid = block.pivot(index=SETTING, columns="method", values="der")
    failed = block.assign(bad=_bad(block)).pivot(index=SETTING, columns="method", values="bad")
    places = grid.mask(failed, -np.inf).rank(axis=1, ascending=False, method="average")
    victim = places.groupby(VICTIM, dropna=False, sort=False)
    sums, counts = victim.sum().to_numpy(), victim.size().to_numpy()
    low = high = np.full(places.shape[1], np.nan)
    if len(counts) > 1:
        weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=DRAWS)
        low, high = np.quantile((weights @ sums) / (weights @ counts)[:, None], [0.025, 0.975], axis=0)
    label = cross.drop_duplicates("method").set_index("method").label
    table = pd.DataFrame({"method": places.columns, "label": [label[m] for m in places.columns],
                          "rank": places.mean().to_numpy(), "low": low, "high": high,
                          "mean": grid.mask(failed).mean().to_numpy(), "failed": failed.sum().to_numpy(),
                          "settings": len(places)})
    known = cross[cross.der.notna() | _bad(cross)].groupby("method").size()
    left = label.drop(places.columns)
    not_ranked = left.reset_index().assign(settings=known.reindex(left.index, fill_value=0).to_numpy())
    table = table.sort_values("rank", kind="stable").reset_index(drop=True)
    return Ranking(table, len(places), len(counts), not_ranked)


def groups(cross: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What is ranked and drawn together: each recipe's settings, after all of them where they can be compared at all."""
    recipes = {f"recipe {recipe}": part for recipe, part in cross.groupby("recipe", sort=False)}
    if comparable(cross).recipe.nunique() > 1:
        return {"all recipes": cross, **recipes}
    return recipes


def pareto(points: np.ndarray) -> np.ndarray:
    """Which points no other dominates, bool [N].

    A point dominates another when its cost is not higher and its quality not lower, and one of the two is better.

    Args:
        points: float [N, 2], cost (lower is better) and quality (higher is better). A point with NaN is not on the front.
    """
    points = np.asarray(points, float).reshape(-1, 2)
    known = ~np.isnan(points).any(1)
    cost, quality = np.where(known[:, None], points, [np.inf, -np.inf]).T
    no_worse = (cost[:, None] <= cost) & (quality[:, None] >= quality)
    better = (cost[:, None] < cost) | (quality[:, None] > quality)
    return known & ~(no_worse & better).any(0)


def trade_offs(cross: pd.DataFrame) -> pd.DataFrame:
    """Means of each defence over the settings in which all have a value: der, seconds, acc_loss (victim's ACC − ACC), asr.

    `failed` counts the other settings in which it failed; `front_cost` and `front_loss` say whether it is on the front of
    (seconds, DER) and of (ASR, loss).
    """
    block = comparable(cross, failures=False)
    block = block.assign(acc_loss=block.acc_victim - block.acc)
    means = block.groupby(["method", "label"], sort=False).agg(
        der=("der", "mean"), seconds=("seconds", "mean"), acc_loss=("acc_loss", "mean"), asr=("asr", "mean"),
        settings=("der", "size")).reset_index()
    failed = cross[_bad(cross)].groupby("method").size()
    return means.assign(failed=[int(failed.get(method, 0)) for method in means.method],
                        front_cost=pareto(means[["seconds", "der"]].to_numpy(float)),
                        front_loss=pareto(np.stack([means.asr, -means.acc_loss], 1).astype(float)))


def quality_against_cost(cross: pd.DataFrame):
    """Mean DER against seconds, and loss of ACC against the ASR that is left, with their fronts; a row per group."""
    parts = {title: means for title, part in groups(cross).items() if not (means := trade_offs(part)).empty}
    if not parts:
        return with_numbers(nothing("no setting in which two defences have a value"), pd.DataFrame())
    looks = styles(label for means in parts.values() for label in means.label)
    figure, axes = plt.subplots(len(parts), 2, figsize=(9.6, 3.7 * len(parts)), squeeze=False, layout="constrained")
    for row, (title, means) in zip(axes, parts.items(), strict=True):
        count = int(means.settings.iloc[0])
        note = f"{title}, mean over {count} settings" if count > 1 else f"{title}, one setting"
        shown = means.assign(acc_loss=100 * means.acc_loss, asr=100 * means.asr)
        _front(row[0], shown, "seconds", "der", front="front_cost", looks=looks)
        _front(row[1], shown, "asr", "acc_loss", front="front_loss", looks=looks)
        row[0].set(xscale="log", xlabel="seconds (lower is better)", ylabel="DER (higher is better)", title=note)
        row[0].xaxis.set_major_formatter("{x:g}")
        row[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        row[0].xaxis.set_minor_formatter(NullFormatter())
        row[1].set(xlabel="ASR left, % (lower is better)", ylabel="loss of ACC, points (lower is better)", title=note)
    handles = [handle(label, color=colour, marker=marker, ls="") for label, (colour, marker) in looks.items()]
    handles.append(handle("Pareto front", color="grey", lw=1.2))
    if any((means.failed > 0).any() for means in parts.values()):
        handles.append(handle("failed elsewhere", color="grey", marker="o", mfc="none", ls=""))
    figure.legend(handles=handles, loc="outside right upper")
    return with_numbers(figure, pd.concat([means.assign(group=title) for title, means in parts.items()]))


def overview(cross: pd.DataFrame):
    """Mean ACC against mean ASR after every defence, of the data set, network, recipe and budget in which most defences
    have gone through most settings; and what it shows, in words. None where no two defences can be compared."""
    parts = [(comparable(part, failures=False), part) for _, part in
             cross[cross.attack != "clean"].groupby(["dataset", "model", "recipe", "budget"], sort=False)]
    best, everything = max(parts, key=lambda pair: len(pair[0]), default=(pd.DataFrame(), None))
    if best.empty:
        return None
    absent = [label for label in everything.label.unique() if label not in set(best.label)]
    means = best.groupby("label", sort=False)[["asr", "acc"]].mean().reset_index()
    none = best.drop_duplicates(VICTIM)[["asr_victim", "acc_victim"]].mean()
    means.loc[len(means)] = ["no defence", *none]
    looks = {**styles(means.label[:-1]), "no defence": ("#000000", "X")}
    figure, axis = plt.subplots(figsize=(5.6, 4.9), layout="constrained")
    for row in means.itertuples():
        colour, mark = looks[row.label]
        axis.plot(100 * row.asr, 100 * row.acc, mark, color=colour, ms=9, mec="white", mew=0.6, clip_on=False, zorder=3)
    axis.set(xlabel="ASR left, % (lower is better)", ylabel="ACC, % (higher is better)", xlim=(-2, 102))
    figure.legend(handles=[handle(label, color=colour, marker=mark, ls="") for label, (colour, mark) in looks.items()],
                  loc="outside lower center", ncols=3, fontsize=8)
    first, settings, seeds = best.iloc[0], len(best.drop_duplicates(SETTING)), int(best.seeds.max())
    text = (f"Best stands top left. {first['model']} on {first.dataset}, recipe {first.recipe}, budget {first.budget} "
            f"({first.clean_samples:g} clean images); means over the {settings} setting{'s' * (settings > 1)} (attack, poison "
            f"rate) that all {len(means) - 1} defences have gone through, {seeds} seed{'s' * (seeds > 1)}."
            + f" Not shown, for some of these cells failed, are destroyed or not run: {', '.join(absent)}." * bool(absent))
    return with_numbers(figure, means), text


def _front(axis, means: pd.DataFrame, x: str, y: str, *, front: str, looks: dict) -> None:
    for row in means.itertuples():
        colour, marker = looks[row.label]
        axis.plot(getattr(row, x), getattr(row, y), marker, color=colour, ms=7, mfc="none" if row.failed else colour,
                  mec=colour if row.failed else "white", zorder=3)
    best = means[means[front]].sort_values([x, y])
    axis.step(best[x], best[y], where="post", color="grey", lw=1.2, zorder=2)
    for row in best.itertuples():
        axis.annotate(row.label, (getattr(row, x), getattr(row, y)), xytext=(5, 5), textcoords="offset points", fontsize=7)


def rank_figure(rankings: dict[str, Ranking]):
    """Mean ranks, best on top, with their intervals; a panel per group."""
    rankings = {title: ranking for title, ranking in rankings.items() if len(ranking.table)}
    if not rankings:
        return nothing("no setting with two defences")
    sizes = [len(ranking.table) for ranking in rankings.values()]
    figure, axes = plt.subplots(len(sizes), 1, figsize=(6.6, sum(0.27 * n + 1.1 for n in sizes)), squeeze=False,
                                height_ratios=[n + 1 for n in sizes], layout="constrained")
    for axis, (title, ranking) in zip(axes[:, 0], rankings.items(), strict=True):
        table = ranking.table
        axis.errorbar(table["rank"], range(len(table)), xerr=errors(table.assign(value=table["rank"])), fmt="o",
                      color=COLOURS[5], lw=1.2, capsize=2.5)
        names = [row.label + (f" (failed in {row.failed})" if row.failed else "") for row in table.itertuples()]
        axis.set_yticks(range(len(table)), names)
        axis.set(xlim=(0.7, len(table) + 0.3), ylim=(len(table) - 0.5, -0.5), xlabel="mean rank by DER",
                 title=f"{title}: {ranking.settings} setting{'s' * (ranking.settings > 1)}")
    return figure


def heat_map(cross: pd.DataFrame):
    """ASR in percent by defence and by attack and poison rate, a panel per recipe and budget; failures are crossed out.

    Victims without a backdoor have no ASR, and are left out. The first row is the undefended victim. Entries are means over
    data sets and networks where there are several; a star says that some of them failed or are missing, a cross that all did.
    """
    panels = [part for _, part in cross[cross.attack != "clean"].groupby(["recipe", "budget"], sort=False)]
    if not panels:
        return nothing("no purified cells")
    grids = [_heat_grid(part) for part in panels]
    widths = max(values.shape[1] for values, _ in grids)
    heights = [len(values) for values, _ in grids]
    figure, axes = plt.subplots(len(panels), 1, figsize=(0.62 * widths + 3.2, sum(0.27 * n + 1.5 for n in heights)),
                                height_ratios=[n + 1 for n in heights], squeeze=False, layout="constrained")
    for axis, part, (values, partly) in zip(axes[:, 0], panels, grids, strict=True):
        image = axis.imshow(values.to_numpy(float), vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(values.to_numpy(float)):
            tried = partly.iat[i, j]
            if np.isnan(value):
                if tried == tried:
                    axis.plot(j, i, "x", color="crimson", ms=9, mew=2)
                continue
            axis.text(j, i, f"{100 * value:.0f}{'*' if tried else ''}", ha="center", va="center", fontsize=7,
                      color="black" if value > 0.55 else "white")
        axis.set_xticks(range(values.shape[1]), values.columns, rotation=40, ha="right")
        axis.set_yticks(range(len(values)), values.index)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        places = part[["dataset", "model"]].drop_duplicates()
        where = f"{places.model.iloc[0]} on {places.dataset.iloc[0]}"
        if len(places) > 1:
            where = f"mean over {len(places)} pairs of network and data set"
        axis.set_title(f"ASR in %: recipe {part.recipe.iloc[0]}, budget {part.budget.iloc[0]}, {where}")
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=min(1.0, 3.0 / sum(heights)) if len(panels) > 1 else 1.0,
                    format=lambda value, _: f"{100 * value:.0f} %")
    return figure


def _heat_grid(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means [defences, attacks], and whether some cells are without a value (NaN where there are no cells at all)."""
    part = part.assign(column=["\n".join(setting_name(row).split(" ", 1)) for row in part.itertuples()],
                       partly=part.failed.astype(float))
    part = part.sort_values(["attack", "attack_variant", "poison_rate"], ascending=[True, True, False], kind="stable")
    columns = list(dict.fromkeys(part.column))
    cells = part.groupby(["label", "column"], sort=False).agg(value=("asr", "mean"), partly=("partly", "max"))
    values, partly = (cells[key].unstack().reindex(columns=columns) for key in ("value", "partly"))
    order = values.mean(axis=1).sort_values(kind="stable").index
    none = part.drop_duplicates(VICTIM).groupby("column").asr_victim.mean().reindex(columns)
    return (pd.concat([none.to_frame("no defence").T, values.reindex(order)]),
            pd.concat([pd.DataFrame(0.0, index=["no defence"], columns=columns), partly.reindex(order)]))


def write_cross(cells: pd.DataFrame, labels: dict[str, str], run: Mapping, out: Mapping[str, str | Path]) -> None:
    """Write the cross table, its figures and the page that shows them; the page says so when there is nothing.

    `run` has `scale`, `papers` (key of each page of the site) and `registry` (`cupel.reporting.paper.Paper`). `out` has the
    paths `page` (HTML), and in its folder `table` (CSV) and `figures` (a folder).
    """
    table, figures, scale = Path(out["table"]), Path(out["figures"]), run["scale"]
    register(run["registry"])
    cross = cross_table(cells, labels)
    write_text(table, cross.to_csv(index=False))
    rankings = {title: ranks(part, rng=stream(0, "ranks", title)) for title, part in groups(cross).items()}
    numbers = pd.concat([ranking.table.assign(group=title) for title, ranking in rankings.items()] or [pd.DataFrame()])
    pictures = {"ranks": with_numbers(rank_figure(rankings), numbers), "fronts": quality_against_cost(cross),
                "asr": with_numbers(heat_map(cross), cross[[*SETTING, "label", "asr", "asr_victim", "failed", "credited"]])}
    for name, figure in pictures.items():
        save(figure, figures / f"{name}.svg")
    shown = overview(cross)
    if shown:
        save(shown[0], figures / "overview.svg")
    known = about(cells[cells.stage == "purified"], scale)
    write_json(figures / "captions.json", {"overview": f"{shown[1]} {known}"} if shown else {})
    rows = [{**row._asdict(), "attack": attack_name(row), "runs": f"{row.seeds} of {row.planned}",
             "href": "cells.html#" + urlencode({"method": row.method, "attack": attack_name(row), "budget": row.budget,
                                                "words": f"{100 * row.poison_rate:g}%" if row.poison_rate else ""})}
            for row in cross.itertuples()]
    write_page(out["page"], "cross.html.j2", scale=scale, rows=rows, rankings=rankings, table=table.name,
               here="Defences side by side", nav=navigation(run),
               choices={"defence": sorted({row["label"] for row in rows}), "attack": sorted({row["attack"] for row in rows}),
                        "budget": sorted({row["budget"] for row in rows})},
               pictures={name: f"{figures.name}/{name}.svg" for name in pictures}, failed=int(cross.failed.sum()),
               seeds=sorted(set(cells.seed[cells.stage == "purified"])), methods=cross.method.nunique(),
               settings=len(cross.drop_duplicates(SETTING)), draws=DRAWS, about=known)
