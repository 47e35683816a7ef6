"""The tidy table of all cells, and wide tables made from it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.evaluation.redirection import redirected
from cupel.evaluation.settings import GATE, NO_VICTIM, NOT_RUN, SETTING, validity
from cupel.files import read_json, write_text

#: what a row of a long table is named by: means are over seeds alone
KEYS = (*SETTING, "method", "label", "metric")
METRICS = ("acc", "asr", "ra", "der", "arr", "rdr")
COLUMNS = ["paper", "stage", "dataset", "model", "recipe", "attack", "attack_variant", "poison_rate", "defence", "budget",
           "variant", "seed", "metric", "value", "n", "low", "high", "rate_reached", "seconds", "peak_memory_mb",
           "peak_vram_mb", "clean_samples", "device", "precision", "threads", "unchanged", "status", "reason", "path",
           "attack_parameters", "defence_parameters"]
NUMBERS = ("poison_rate", "value", "low", "high", "rate_reached", "seconds", "peak_memory_mb", "peak_vram_mb",
           "clean_samples", "threads")


def gather(cells: list[dict], gates: Mapping[str, Mapping[str, float]] = {}) -> pd.DataFrame:
    """The tidy table: one row per paper, cell and metric (see `COLUMNS`); rates are fractions. `valid` says that the victim of
    a cell has its backdoor (`cupel.evaluation.settings.validity`).

    Records of image classifiers give `redirected` as well (`cupel.evaluation.redirection`).

    A record has its numbers flat (`acc`, `acc_n`, `acc_low`, `acc_high`; `metrics` lists them, else they are `METRICS` and what
    else has its n) or, where one model is measured many times, as `rows`: metric, value, n, low, high and what differs in its
    identity. A failed cell keeps its rows, without values and with its reason; so does one that left no result but a log, and
    one that was `not run`, which is no failure.

    Args:
        cells: expected cells with `paper`, `folder` and what names them (`cupel.experiment.Grid.cells`).
        gates: lowest values of a victim by metric, of papers that have their own.
    """
    rows = []
    for cell in cells:
        path = Path(cell["folder"]) / "metrics.json"
        if path.is_file():
            record = read_json(path)
            record |= redirected(record.get("confusion", {}))
        else:
            status, reason = _no_result(cell)
            attack, _, attack_variant = cell["attack"].partition("~")
            defence, _, variant = cell.get("defence", "").partition("~")
            record = {**cell, "attack": attack, "attack_variant": attack_variant, "defence": defence,
                      "variant": variant, "budget": cell.get("budget", ""), "poison_rate": float(cell["rate"]),
                      "seed": int(cell["seed"]), "status": status, "reason": reason}
        base = {key: record.get(key) for key in COLUMNS} | {
            "paper": cell["paper"], "path": cell["folder"], "reason": record.get("reason", ""),
            "unchanged": bool(record.get("unchanged", False))}
        failed = record["status"] != "ok"
        nothing = {"value": np.nan, "n": 0, "low": np.nan, "high": np.nan}
        if "rows" in record:
            found = record["rows"]
        else:
            known = METRICS if base["poison_rate"] or not failed else METRICS[:1]  # without a trigger no ASR was asked for
            names = record.get("metrics", [*known, *(key for key in record if f"{key}_n" in record and key not in known)])
            found = [{"metric": metric, "value": record.get(metric, np.nan), **{
                key: record[f"{metric}_{key}"] for key in ("n", "low", "high") if f"{metric}_{key}" in record}}
                for metric in (names[:3] if failed else [name for name in names if name in record])]
        # what has pictures alone, and no number, is a cell all the same
        rows += [{**base, **nothing, **row} for row in found or [{"metric": ""}]]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table.astype({"n": int, "seed": int, **dict.fromkeys(NUMBERS, float)})
    valid = [validity(part, gates.get(paper, GATE)).implanted for paper, part in table.groupby("paper", sort=False)]
    return table.assign(valid=pd.concat(valid))


def misfit(cells: pd.DataFrame, expected: Iterable[Mapping]) -> str:
    """What is wrong with a tidy table that lacks an expected cell of a paper, or has another, in a sentence; else empty."""
    wanted = dict.fromkeys((cell["paper"], cell["folder"]) for cell in expected)
    there = dict.fromkeys(zip(cells.paper, cells.path, strict=True))
    for places, others, what in ((wanted, there, "asked for and not in it"), (there, wanted, "in it and not asked for")):
        if odd := [place for place in places if place not in others]:
            return (f"The report is not that of the cells asked for: {len(odd)} are {what}, first {odd[0][1]} (paper "
                    f"{odd[0][0]}). Remove cells.parquet and run the same command again")
    return ""


def _no_result(cell: dict) -> tuple[str, str]:
    """Status and reason of a cell that left no result: the last line of its newest log, which says what its error was."""
    logs = sorted(Path().glob(cell.get("logs", "")) if cell.get("logs") else (), key=lambda path: path.stat().st_mtime)
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").split("\n") if logs else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ("failed", f"no result: {last} (more in {logs[-1]})") if last else (NOT_RUN, "its job has not begun")


def attack_name(row) -> str:
    """Name of a row's attack with its variant."""
    return row.attack + (f"~{row.attack_variant}" if row.attack_variant else "")


def setting_name(row) -> str:
    """Attack and poison rate of a row."""
    return f"{attack_name(row)} {100 * row.poison_rate:g} %"


def method_name(row) -> str:
    """Defence of a row with its variant; its stage, `victim`, where there is none."""
    return f"{row.defence}~{row.variant}".rstrip("~") or row.stage


def with_names(cells: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Add `method` (the defence with its variant, `victim` for none) and `label` (for people)."""
    methods = [method_name(row) for row in cells.itertuples()]
    return cells.assign(method=methods, label=[labels.get(method, method) for method in methods])


def summary(cells: pd.DataFrame, keys: Sequence[str] = KEYS, n: str = "sum") -> pd.DataFrame:
    """Mean over seeds, with n summed (or another aggregate), and how many seeds failed or were not run; one row per `keys`.

    `credited` says that all victims behind it have their backdoor, `destroyed` that a defence destroyed one of the networks,
    `unchanged` that it gave one back to the bit (`cupel.evaluation.settings.validity`).
    """
    cells = validity(cells).assign(failed=cells.status == "failed", not_run=cells.status == NOT_RUN)
    groups = cells.groupby(list(keys), dropna=False, sort=False)
    return groups.agg(value=("value", "mean"), low=("low", "mean"), high=("high", "mean"), n=("n", n),
                      seeds=("seed", "nunique"), failed=("failed", "sum"), not_run=("not_run", "sum"),
                      seconds=("seconds", "mean"),
                      rate_reached=("rate_reached", "mean"), credited=("implanted", "all"),
                      destroyed=("destroyed", "any"), unchanged=("unchanged", "any")).reset_index()


def attach_reported(table: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Add the column `reported` (fractions); empty where the paper's number is not known, or fits several of our settings.

    Reported rows are told apart by the columns of a setting that their file has; more columns settle what a number belongs to.
    """
    if reported.empty:
        return table.assign(reported=np.nan)
    known = reported.assign(reported=reported.value / 100, metric=reported.metric.str.lower()).rename(
        columns={"defence": "method"})
    keys = [column for column in (*SETTING, "method", "metric") if column in known]
    merged = table.merge(known[[*keys, "reported"]], how="left", on=keys)
    return merged.assign(reported=merged.reported.mask(merged.duplicated(keys, keep=False)))


def no_value(row) -> str:
    """Why a row of a summary has no value: `failed`, `not run`, or nothing."""
    return "failed" if row.failed else NOT_RUN if row.not_run else ""


def interval_text(row) -> str:
    """A value with its interval: percent and the number of samples for a rate, else as it is; why there is none, or empty."""
    if np.isnan(row.value):
        return no_value(row)
    if row.n:
        return f"{100 * row.value:.1f} ({100 * row.low:.0f}–{100 * row.high:.0f}; n={row.n})"
    return f"{row.value:.3g}" + ("" if np.isnan(row.low) else f" ({row.low:.3g}–{row.high:.3g})")


#: what `marked` adds, for captions
MARKS = (f"† less than two thirds of the victim's ACC are left; ‡ {NO_VICTIM} (ASR below 80 % or ACC below 20 %): in no "
         "mean, and no defence's merit; § the defence gave the victim back as it was, to the bit")


def marked(rows: pd.DataFrame) -> pd.DataFrame:
    """Add `setting` (attack and poison rate, ‡ where a victim is not valid) and `mark` († for a destroyed network, § for an
    unchanged one)."""
    names = [setting_name(row) + " ‡" * (not row.credited) for row in rows.itertuples()]
    marks = [" " * (row.destroyed or row.unchanged) + "†" * row.destroyed + "§" * row.unchanged for row in rows.itertuples()]
    return rows.assign(setting=names, mark=marks)


def with_texts(rows: pd.DataFrame) -> pd.DataFrame:
    """Add `text`: every value with its interval."""
    return rows.assign(text=[interval_text(row) for row in rows.itertuples()])


def frame(rows: dict[str, dict], columns: Iterable | None = None) -> pd.DataFrame:
    """A wide table from row label to column to text, with these columns, or with all that have an entry."""
    if columns is None:
        filled = {column for row in rows.values() for column, text in row.items() if text != ""}
        columns = [column for column in dict.fromkeys(column for row in rows.values() for column in row) if column in filled]
    columns = list(columns)
    return pd.DataFrame([[row.get(column, "") for column in columns] for row in rows.values()], index=list(rows),
                        columns=pd.MultiIndex.from_tuples(columns) if columns and isinstance(columns[0], tuple) else columns)


def spread(rows: pd.DataFrame, index: str, columns: str | list[str], order: Iterable | None = None,
           across: Iterable | None = None) -> pd.DataFrame:
    """The texts of a long table (column `text`) as a wide one, empty where there is none.

    Args:
        rows: with `text` and the columns named here; of two texts for one entry the first counts.
        index, columns: what names rows and columns; several columns make as many header rows.
        order, across: rows and columns to keep, as far as they are there, in this order; None keeps all, as they come.
    """
    grid = rows.pivot_table(index=index, columns=columns, values="text", aggfunc="first", sort=False)
    for axis, wanted in (("index", order), ("columns", across)):
        present = getattr(grid, axis)
        keys = rows[index if axis == "index" else columns]
        came = dict.fromkeys(keys if isinstance(keys, pd.Series) else keys.itertuples(index=False, name=None))
        kept = [key for key in dict.fromkeys(came if wanted is None else wanted) if key in present]
        grid = grid.reindex(**{axis: pd.MultiIndex.from_tuples(kept) if kept and isinstance(kept[0], tuple) else kept})
    return grid.fillna("")


def sideways(rows: pd.DataFrame, keys: list[str], metrics: Iterable[str]) -> pd.DataFrame:
    """One row per `keys`, which are columns, with columns `<metric>`, `<metric>_low` and `<metric>_high`; means where there
    are several, and only where the first two metrics are known."""
    names = {(kind, metric): f"{metric}{end}" for metric in metrics
             for kind, end in (("value", ""), ("low", "_low"), ("high", "_high"))}
    grid = rows.pivot_table(index=keys, columns="metric", values=["value", "low", "high"], sort=False)
    grid = grid.reindex(columns=list(names)).set_axis(list(names.values()), axis=1)
    return grid.dropna(subset=list(metrics)[:2]).reset_index()


def wide(table: pd.DataFrame, order: list[str], metrics: tuple[str, ...] = ("acc", "asr")) -> pd.DataFrame:
    """Rows: defence; columns: setting and metric; entries in percent as text, `failed` or `not run` where there is none."""
    rows = marked(table[table.metric.isin(metrics)])
    texts = [no_value(row) if np.isnan(row.value) else
             f"{100 * row.value:.1f}" + "*" * bool(row.failed or row.not_run) + row.mark for row in rows.itertuples()]
    rows = rows.assign(text=texts, metric=rows.metric.str.upper())
    across = [(setting, metric.upper()) for setting in dict.fromkeys(rows.setting) for metric in metrics]
    return spread(rows, "label", ["setting", "metric"], [*order, *rows.label], across)


def by_setting(table: pd.DataFrame, order: list[str], metrics: tuple[str, ...] = METRICS) -> pd.DataFrame:
    """Rows: setting and defence; columns: metrics in percent with their 95 % intervals, or why there are none."""
    table = marked(table)
    bounds = ["" if np.isnan(row.low) else f" ({100 * row.low:.1f} to {100 * row.high:.1f})" for row in table.itertuples()]
    texts = [no_value(row) if np.isnan(row.value) else f"{100 * row.value:.1f}{bound}{row.mark}"
             for row, bound in zip(table.itertuples(), bounds, strict=True)]
    names = table.setting + ": " + table.label
    rows = table.assign(text=texts, metric=table.metric.str.upper(), row=names).drop_duplicates(["row", "metric"], keep="last")
    index = [f"{setting}: {label}" for setting in dict.fromkeys(table.setting) for label in [*order, *table.label]]
    return spread(rows, "row", "metric", index, [metric.upper() for metric in metrics])


def means(table: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Rows: defence; columns: mean over settings of every metric in percent, of seconds, and the number of settings measured.

    Settings of victims without a backdoor are left out; `destroyed` and `unchanged` count settings in which a defence destroyed
    a network, or gave it back as it was.
    """
    table = table[table.credited]
    if table.value.isna().all():  # nothing was measured
        return pd.DataFrame()
    values = table.pivot_table(index="label", columns="metric", values="value", aggfunc="mean")
    present = [metric for metric in METRICS if metric in values]
    grid = values[present].map(lambda value: "" if np.isnan(value) else f"{100 * value:.1f}")
    first = table[table.metric == present[0]].groupby("label")
    grid["seconds"] = first.seconds.mean().map("{:.1f}".format)
    grid["settings"] = first.value.count().astype(str)
    for name in ("failed", "destroyed", "unchanged"):
        grid[name] = first[name].sum().astype(str)
    grid.columns = pd.MultiIndex.from_tuples([("mean", name.upper() if name in METRICS else name) for name in grid.columns])
    return grid.loc[[label for label in order if label in grid.index]]


def _latex(text) -> str:
    return str(text).replace("%", r"\%").replace("~", r"\textasciitilde ").replace("_", r"\_")


def write_table(grid: pd.DataFrame, stem: str | Path, caption: str, index: str = "defence") -> None:
    """Write a wide table as CSV, Markdown and LaTeX; `index` names its rows."""
    stem = Path(stem)
    names = [column if isinstance(column, str) else " ".join(map(str, column)) for column in grid.columns]
    flat = grid.set_axis(names, axis=1).rename_axis(index)
    write_text(stem.with_suffix(".csv"), flat.to_csv())
    write_text(stem.with_suffix(".md"), f"{caption}\n\n{flat.to_markdown(disable_numparse=True)}\n")
    latex = grid.map(lambda text: str(text).replace("%", r"\%")).rename(index=_latex, columns=_latex).rename_axis(index=None)
    latex.columns.names = [None] * latex.columns.nlevels
    write_text(stem.with_suffix(".tex"), latex.to_latex(caption=caption.replace("%", r"\%"), escape=False,
                                                        multicolumn_format="c"))
