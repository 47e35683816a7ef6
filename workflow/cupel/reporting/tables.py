"""The tidy table of all cells, and the tables of the papers made from it."""

from pathlib import Path

import numpy as np
import pandas as pd

from cupel.files import read_json, write_text

IDENTITY = ["stage", "dataset", "model", "recipe", "attack", "attack_variant", "poison_rate", "defence", "budget",
            "variant", "seed"]
METRICS = ("acc", "asr", "ra", "der", "arr", "rdr")
COLUMNS = ["paper", *IDENTITY, "metric", "value", "n", "low", "high", "rate_reached", "seconds", "peak_memory_mb",
           "peak_vram_mb", "clean_samples", "status", "reason", "path"]


def gather(cells: list[dict]) -> pd.DataFrame:
    """The tidy table: one row per paper, cell and metric (see `COLUMNS`); rates are fractions.

    A record has its numbers flat (`acc`, `acc_n`, `acc_low`, `acc_high`; `metrics` lists others than `METRICS`) or, where
    one model is measured many times, as `rows`: metric, value, n, low, high and what differs in its identity. A failed cell
    keeps its rows, without values and with its reason; so does one that left no result.

    Args:
        cells: expected cells with `paper`, `folder` and what names them (`cupel.grid.Grid.cells`).
    """
    rows = []
    for cell in cells:
        path = Path(cell["folder"]) / "metrics.json"
        if path.is_file():
            record = read_json(path)
        else:
            attack, _, attack_variant = cell["attack"].partition("~")
            defence, _, variant = cell.get("defence", "").partition("~")
            record = {**cell, "attack": attack, "attack_variant": attack_variant, "defence": defence,
                      "variant": variant, "budget": cell.get("budget", ""), "poison_rate": float(cell["rate"]),
                      "seed": int(cell["seed"]), "status": "failed", "reason": "no result: see its log"}
        base = {key: record.get(key) for key in (*IDENTITY, "rate_reached", "seconds", "peak_memory_mb", "peak_vram_mb",
                                                 "clean_samples", "status")}
        base |= {"paper": cell["paper"], "path": cell["folder"], "reason": record.get("reason", "")}
        failed = record["status"] != "ok"
        nothing = {"value": np.nan, "n": 0, "low": np.nan, "high": np.nan}
        if "rows" in record:
            rows += [{**base, **nothing, **row} for row in record["rows"]]
            continue
        names = record.get("metrics", METRICS)
        for metric in names[:3] if failed else [m for m in names if m in record]:
            found = {key: record[f"{metric}_{key}"] for key in ("n", "low", "high") if f"{metric}_{key}" in record}
            rows.append({**base, **nothing, "metric": metric, "value": record.get(metric, np.nan), **found})
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"poison_rate": float, "value": float, "low": float, "high": float, "n": int, "seed": int,
                         "rate_reached": float, "seconds": float, "peak_memory_mb": float, "peak_vram_mb": float,
                         "clean_samples": float})


def defence_name(row: pd.Series) -> str:
    """Name of a row's defence with its variant, `victim` for none."""
    return "victim" if row.stage == "victim" else row.defence + (f"~{row.variant}" if row.variant else "")


def with_names(cells: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Add `method` (key) and `label` (for people)."""
    named = cells.copy()
    named["method"] = [defence_name(row) for row in cells.itertuples()]
    named["label"] = [labels.get(name, name) for name in named.method]
    return named


def summary(cells: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, with n summed, and how many seeds failed; one row per setting, method and metric."""
    keys = ["dataset", "model", "recipe", "attack", "attack_variant", "poison_rate", "budget", "method", "label", "metric"]
    groups = cells.groupby(keys, dropna=False, sort=False)
    return groups.agg(value=("value", "mean"), low=("low", "mean"), high=("high", "mean"), n=("n", "sum"),
                      seeds=("seed", "nunique"), failed=("status", lambda s: int((s != "ok").sum())),
                      seconds=("seconds", "mean"), rate_reached=("rate_reached", "mean")).reset_index()


def attach_reported(table: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Add the column `reported` (fractions); empty where the paper's number is not known."""
    if reported.empty:
        return table.assign(reported=np.nan)
    known = reported.assign(reported=reported.value / 100, metric=reported.metric.str.lower())
    keys = ["dataset", "model", "attack", "poison_rate", "defence", "metric"]
    return table.merge(known[[*keys, "reported"]].rename(columns={"defence": "method"}), how="left",
                       on=[k if k != "defence" else "method" for k in keys])


def wide(table: pd.DataFrame, order: list[str], metrics: tuple[str, ...] = ("acc", "asr")) -> pd.DataFrame:
    """Rows: defence; columns: attack, rate and metric; entries in percent as text, `failed` where a cell failed."""
    table = table[table.metric.isin(metrics)].copy()
    table["text"] = ["failed" if row.failed and np.isnan(row.value) else f"{100 * row.value:.1f}" + ("*" if row.failed else "")
                     for row in table.itertuples()]
    table["setting"] = [f"{row.attack}{'~' + row.attack_variant if row.attack_variant else ''} {100 * row.poison_rate:g} %"
                        for row in table.itertuples()]
    table["metric"] = table.metric.str.upper()
    columns = [(s, m.upper()) for s in dict.fromkeys(table.setting) for m in metrics]
    grid = table.pivot_table(index="label", columns=["setting", "metric"], values="text", aggfunc="first")
    rows = [label for label in order if label in grid.index] + [label for label in grid.index if label not in order]
    return grid.reindex(index=rows, columns=pd.MultiIndex.from_tuples(columns)).fillna("")


def by_setting(table: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Rows: setting and defence; columns: every metric in percent with its 95 % interval; `failed` where a cell failed."""
    metrics = [metric for metric in METRICS if (table.metric == metric).any()]
    rank = {label: k for k, label in enumerate(order)}
    rows = {}
    for row in table.itertuples():
        attack = f"{row.attack}{'~' + row.attack_variant if row.attack_variant else ''} {100 * row.poison_rate:g} %"
        text = f"{100 * row.value:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})" if not np.isnan(row.value) else "failed"
        rows.setdefault((attack, row.label), {})[row.metric] = text
    attacks = list(dict.fromkeys(attack for attack, _ in rows))
    ordered = sorted(rows, key=lambda key: (attacks.index(key[0]), rank.get(key[1], len(rank))))
    grid = pd.DataFrame([[rows[key].get(metric, "") for metric in metrics] for key in ordered],
                        index=[f"{attack}: {label}" for attack, label in ordered], columns=[m.upper() for m in metrics])
    return grid


def means(table: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Rows: defence; columns: mean over settings of every metric in percent, of seconds, and the number of settings."""
    values = table.pivot_table(index="label", columns="metric", values="value", aggfunc="mean")
    present = [metric for metric in METRICS if metric in values]
    grid = values[present].map(lambda value: "" if np.isnan(value) else f"{100 * value:.1f}")
    first = table[table.metric == present[0]].groupby("label")
    grid["seconds"] = first.seconds.mean().map("{:.1f}".format)
    grid["settings"] = first.size().astype(str)
    grid["failed"] = first.failed.sum().astype(str)
    rows = [label for label in order if label in grid.index]
    grid.columns = pd.MultiIndex.from_tuples([("mean", name.upper() if name in METRICS else name) for name in grid.columns])
    return grid.loc[rows]


def _latex(text) -> str:
    return str(text).replace("%", r"\%").replace("~", r"\textasciitilde ").replace("_", r"\_")


def write_table(grid: pd.DataFrame, stem: str | Path, caption: str, index: str = "defence") -> None:
    """Write a wide table as CSV, Markdown and LaTeX; `index` names its rows."""
    stem = Path(stem)
    flat = grid.copy()
    flat.columns = [column if isinstance(column, str) else " ".join(map(str, column)) for column in grid.columns]
    flat.index.name = index
    write_text(stem.with_suffix(".csv"), flat.to_csv())
    write_text(stem.with_suffix(".md"), f"{caption}\n\n{flat.to_markdown(disable_numparse=True)}\n")
    latex = grid.map(lambda text: str(text).replace("%", r"\%"))
    if isinstance(grid.columns, pd.MultiIndex):
        latex.columns = pd.MultiIndex.from_tuples([tuple(map(_latex, column)) for column in grid.columns])
    else:
        latex.columns = list(map(_latex, grid.columns))
    latex.index = list(map(_latex, grid.index))
    write_text(stem.with_suffix(".tex"), latex.to_latex(caption=caption.replace("%", r"\%"), escape=False,
                                                        multicolumn_format="c"))


def victims_beside_twins(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per victim: rate asked for and reached, ACC beside that of the clean twin, ASR with its interval, RA.

    Args:
        cells: the tidy table; the twin of a victim is the clean one of the same data set, model, recipe and seed.
    """
    keys = ["dataset", "model", "recipe", "seed"]
    victims = cells[cells.stage == "victim"]
    twins = victims[(victims.attack == "clean") & (victims.metric == "acc")].set_index(keys).value
    rows = []
    for path, part in victims[victims.attack != "clean"].groupby("path", sort=False):
        first, values = part.iloc[0], part.set_index("metric")
        twin = twins.get(tuple(first[keys]), np.nan)
        row = {key: first[key] for key in ("dataset", "model", "recipe", "attack", "attack_variant", "poison_rate",
                                           "rate_reached", "seed", "status", "reason", "seconds")}
        for metric in ("acc", "asr", "ra"):
            row[metric] = values.value.get(metric, np.nan)
        row |= {"asr_low": values.low.get("asr", np.nan), "asr_high": values.high.get("asr", np.nan),
                "n": values.n.get("asr", 0), "acc_twin": twin, "acc_loss": twin - row["acc"], "path": path}
        rows.append(row)
    return pd.DataFrame(rows)
