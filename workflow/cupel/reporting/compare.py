"""Two runs side by side: what they were made with, verdicts that differ, numbers further apart than test sets explain."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode

import pandas as pd

from cupel.evaluation.agreement import compare_cells, compare_claims, made_with, single
from cupel.evaluation.claims import INDICATED, NOT_JUDGED, VERDICTS
from cupel.files import read_json, write_text
from cupel.reporting.figures import COLOURS, nothing, panels, save, with_numbers
from cupel.reporting.page import link_to, write_page
from cupel.reporting.tables import method_name, setting_name

#: numbers that the page shows, and metrics that the figure has a panel for; all stand in agreement.csv
SHOWN, PANELS = 200, 6
CHANGES = {"flip": "flipped", "direction": "turned", "other": "changed", "": "same"}
ABSENT = "not in this run"


def write_comparison(folders: Sequence[str | Path], out: str | Path, nav: Sequence[dict] = ()) -> tuple:
    """Write `compare.html`, its figure `agreement.svg`, and the tables `agreement.csv` (numbers) and `claims_agreement.csv`.

    Args:
        folders: of both runs, each with cells.parquet and claims.csv.
        out: folder for the files.
        nav: other pages of the site.

    Returns:
        The tidy tables of both runs, and what `compare_cells` and `compare_claims` say.
    """
    page, folders = Path(out) / "compare.html", list(map(Path, folders))
    tables = [pd.read_parquet(folder / "cells.parquet") for folder in folders]
    claims = [pd.read_csv(folder / "claims.csv", keep_default_na=False, na_values={
        name: [""] for name in ("effect", "low", "high")}) for folder in folders]
    cells, verdicts = compare_cells(*tables), compare_claims(*claims)
    write_text(page.with_name("claims_agreement.csv"), verdicts.to_csv(index=False))
    save(scatter(cells), page.with_name("agreement.svg"))
    runs = [run_facts(folder, table, page) for folder, table in zip(folders, tables, strict=True)]
    rows = [{**row._asdict(), "words": CHANGES[row.change], "percent": "fraction" in row.unit,
             "said": [verdict_words(row, side) for side in ("first", "second")]} for row in verdicts.itertuples()]
    numbers = notable(cells)
    write_page(page, "compare.html.j2", scale=" and ".join(dict.fromkeys(run["scale"] for run in runs)), nav=nav,
               here="Two runs compared", runs=runs, changes=CHANGES.values(), papers=sorted(set(verdicts.paper)),
               claims=sorted(rows, key=lambda row: (list(CHANGES).index(row["change"]), row["said"][0] == NOT_JUDGED)),
               board=pd.crosstab(*[pd.Series([row["said"][k].split(",")[0] for row in rows]) for k in (0, 1)]),
               verdicts=[*VERDICTS, ABSENT], compared=int(cells.difference.notna().sum()), apart=int(cells.apart.sum()),
               single=int(single(cells).sum()), more=max(0, len(numbers) - SHOWN),
               seeds_differ=not set(tables[0].seed) & set(tables[1].seed), numbers=[
                   {**row._asdict(), "method": method_name(row), "setting": setting_name(row).replace(" 0 %", ""),
                    "percent": max(row.n_first, row.n_second) > 0, "seed": getattr(row, "seed", ""),
                    "where": [cell_filter(run, row) for run in runs]} for row in numbers.head(SHOWN).itertuples()])
    return tables, cells, verdicts


def run_facts(folder: Path, cells: pd.DataFrame, page: Path) -> dict:
    """What a run was made with, and the address of its pages, empty where they do not stand beside its tables."""
    file = folder / "provenance.json"
    made = read_json(file) if file.is_file() else {}
    address = link_to(page, folder / "x")[:-1] if (folder / "cells.html").is_file() else None
    return {"folder": str(folder), "address": address, "scale": made.get("config", {}).get("scale", folder.name),
            "commit": made.get("commit", "not recorded")[:12], "processor": made.get("processor", "not recorded"),
            "seeds": ", ".join(map(str, sorted(set(cells.seed)))), "computed": made_with(cells), "cells": cells.path.nunique()}


def verdict_words(row, side: str) -> str:
    """The verdict of a run on a claim, with its direction where there is one; that the run has no such claim."""
    verdict, direction = getattr(row, f"verdict_{side}"), getattr(row, f"direction_{side}")
    return ABSENT if pd.isna(verdict) else f"{verdict}, {direction}" if verdict == INDICATED else verdict


def notable(cells: pd.DataFrame) -> pd.DataFrame:
    """Rows of `compare_cells` that are apart, rates with the largest difference first, then those that one run alone has."""
    rows = cells[cells.apart | single(cells)]
    rate = (rows.n_first.fillna(0) > 0) | (rows.n_second.fillna(0) > 0)
    return rows.assign(rate=rate, size=rows.difference.abs()).sort_values(["rate", "size"], ascending=False, kind="stable")


def cell_filter(run: dict, row) -> str:
    """Address of the cells behind a number in a run's table of cells; empty where it has none."""
    asked = {"method": method_name(row) if row.defence else "", "budget": row.budget,
             "attack": row.attack + f"~{row.attack_variant}" * bool(row.attack_variant)}
    return "" if run["address"] is None else f"{run['address']}cells.html#{urlencode(asked)}"


def scatter(cells: pd.DataFrame):
    """Rates of the second run against the first, a panel for each of the metrics that most cells have."""
    known = cells[cells.difference.notna() & (cells.n_first > 0)]
    ends = known.groupby("metric")[["value_first", "value_second"]].agg(["min", "max"])
    shares = ends.index[(ends >= 0).all(axis=1) & (ends <= 1).all(axis=1)]
    metrics = list(known.metric[known.metric.isin(shares)].value_counts().index[:PANELS])
    if not metrics:
        return with_numbers(nothing("no rate that both runs have"), cells)
    figure, axes = panels(len(metrics), 3, 2.9, 3.0)
    for axis, metric in zip(axes.ravel(), metrics, strict=False):
        part = known[known.metric == metric]
        axis.plot([0, 1], [0, 1], color="grey", lw=0.8)
        for apart, colour, mark in ((False, COLOURS[5], "o"), (True, COLOURS[6], "D")):
            rows = part[part.apart == apart]
            axis.scatter(rows.value_first, rows.value_second, 14, color=colour, marker=mark, alpha=0.7, clip_on=False, zorder=3)
        axis.set(title=f"{metric}, {len(part)} cells", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.supxlabel("first run", fontsize=9)
    figure.supylabel("second run", fontsize=9)
    return with_numbers(figure, cells)
