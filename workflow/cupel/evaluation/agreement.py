"""Whether two runs say the same: two machines, precisions, seeds or commits, cell by cell and verdict by verdict.

    python -m cupel.evaluation.agreement results/demo elsewhere/results/demo [--out folder]

prints every claim that differs and what the cells were computed with, writes `compare.html` with its figure and its tables
`agreement.csv` and `claims_agreement.csv`, and ends with 1 where a claim is supported in one run and refuted in the other.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.evaluation.claims import INDICATED, REFUTED, SUPPORTED, TOLD_APART

MADE_WITH = ["device", "precision", "threads"]


def compare_cells(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """One row per paper, cell and metric of either run: both values and states, their difference, and whether it is larger
    than the finite test set explains (`apart`).

    Runs that share no seed are compared by the means over their seeds.

    Args:
        first, second: tidy tables (`cupel.reporting.tables.gather`).
    """
    keys = ["paper", *TOLD_APART, "metric", *(["seed"] if set(first.seed) & set(second.seed) else [])]
    means = [rows.groupby(keys, dropna=False, as_index=False).agg(
        value=("value", "mean"), low=("low", "mean"), high=("high", "mean"), n=("n", "sum"),
        status=("status", lambda found: "ok" if (found == "ok").all() else "failed")) for rows in (first, second)]
    both = means[0].merge(means[1], how="outer", on=keys, suffixes=("_first", "_second"))
    half = [(both[f"high_{side}"] - both[f"low_{side}"]).fillna(0.0) / 2 for side in ("first", "second")]
    difference = both.value_second - both.value_first
    apart = difference.abs() > np.hypot(*half)
    return both.assign(difference=difference, apart=apart)


def single(cells: pd.DataFrame) -> pd.Series:
    """Rows of `compare_cells` whose number one run alone has."""
    return cells.value_first.isna() != cells.value_second.isna()


def compare_claims(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Claims of either run with both verdicts and effects, and `change`: `flip` (supported against refuted), `direction`
    (indicated for and against), `other`, or none. Arguments are `claims.csv`."""
    keys = ["paper", "claim"]
    columns = [*keys, "verdict", "direction", "effect", "low", "high", "settings", "seeds"]
    both = first[columns].merge(second[columns], how="outer", on=keys, suffixes=("_first", "_second"))
    texts = pd.concat([first, second])[[*keys, "statement", "unit"]].drop_duplicates(keys)
    both = both.merge(texts, on=keys)
    pairs = [{row.verdict_first, row.verdict_second} for row in both.itertuples()]
    turned = both.direction_first.fillna("") != both.direction_second.fillna("")
    change = ["flip" if pair == {SUPPORTED, REFUTED} else "direction" if pair == {INDICATED} and turn
              else "other" if len(pair) > 1 else "" for pair, turn in zip(pairs, turned, strict=True)]
    return both.assign(change=change)


def made_with(cells: pd.DataFrame) -> str:
    """Devices, precisions and thread counts behind a tidy table, in words."""
    shares = cells.drop_duplicates("path")[MADE_WITH].astype(str).value_counts()
    return "; ".join(f"{count} cells on {device}, {precision}, {float(threads):g} threads"
                     for (device, precision, threads), count in shares.items())


def main(arguments: list[str] | None = None) -> int:
    """See the module; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, help="folders with cells.parquet and claims.csv")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the page and its tables")
    asked = parser.parse_args(arguments)
    files = [run / name for run in asked.runs for name in ("cells.parquet", "claims.csv")]
    if missing := [str(file) for file in files if not file.is_file()]:
        parser.error(f"there is no {', '.join(missing)}; a run is named by its folder of a scale, such as results/demo")
    from cupel.reporting.compare import write_comparison  # which rests on this module

    tables, cells, verdicts = write_comparison(asked.runs, asked.out)
    for folder, table in zip(asked.runs, tables, strict=True):
        print(f"{folder}: {made_with(table)}")
    compared = cells[cells.difference.notna()]
    print(f"{len(compared)} numbers in both, {int(compared.apart.sum())} further apart than their test sets explain, "
          f"{int(single(cells).sum())} that only one run has")
    changed = verdicts[verdicts.change != ""]
    for row in changed.sort_values("change").itertuples():
        print(f"{row.change:9}  {row.paper}: {row.claim}: {row.verdict_first} {row.direction_first} -> "
              f"{row.verdict_second} {row.direction_second}")
    flips = int((changed.change == "flip").sum())
    print(f"{len(verdicts)} claims, {len(changed)} differ, {flips} flip between supported and refuted")
    return int(flips > 0)


if __name__ == "__main__":
    raise SystemExit(main())
