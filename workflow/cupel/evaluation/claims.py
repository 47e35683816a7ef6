"""Machine-checked claims: a statement, a test over the tidy table, a verdict with an interval."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cupel.evaluation.bootstrap import paired_bootstrap
from cupel.rng import rng

SETTING = ["dataset", "model", "recipe", "attack", "poison_rate"]
COLUMNS = ["paper", "claim", "statement", "source", "scale", "verdict", "effect", "low", "high", "unit", "n", "test"]
VERDICTS = ("supported", "refuted", "inconclusive", "not judged at this scale")


@dataclass(frozen=True)
class Verdict:
    """Outcome of a claim: effect and its 95 % interval in the unit of the test, and how many cells it rests on."""

    verdict: str
    effect: float | None
    low: float | None
    high: float | None
    n: int
    reason: str


def select(cells: pd.DataFrame, where: dict) -> pd.DataFrame:
    """Rows of the tidy table that match `where`: a value, a list of values, or {min:, max:} for numbers."""
    keep = pd.Series(True, index=cells.index)
    for column, wanted in where.items():
        if isinstance(wanted, dict):
            number = cells[column].astype(float)
            keep &= (number >= wanted.get("min", -np.inf)) & (number <= wanted.get("max", np.inf))
        else:
            keep &= cells[column].isin(wanted if isinstance(wanted, list) else [wanted])
    return cells[keep]


def judge(claim: dict, cells: pd.DataFrame, scale: str) -> Verdict:
    """Judge one claim.

    The test compares side A with side B, or with a constant. Both sides are selections of `metric`; they are paired on
    setting and seed (columns in `unpaired`, such as the poison rate in a claim about rates, are left out of the pair;
    columns in `paired`, such as an attack's variant, are added).
    The effect is mean(A − B); the claim asks for effect > margin. It is supported when the whole interval lies above
    the margin, refuted when the whole interval lies below it, else inconclusive.

    `claim` is an entry of claims.yaml (see schemas/claims.schema.yaml), `cells` the tidy table.
    """
    if scale not in claim["scales"]:
        return Verdict(VERDICTS[3], None, None, None, 0, f"can be judged at: {', '.join(claim['scales'])}")
    test = claim["test"]
    table = cells[(cells.status == "ok") & (cells.metric == test["metric"])]
    keys = [c for c in [*SETTING, *test.get("paired", []), "seed"] if c not in test.get("unpaired", [])]
    where = test.get("where", {})

    def side(selection: dict) -> pd.DataFrame:
        rows = select(table, {**where, **selection})
        return rows.groupby(keys, dropna=False, as_index=False).agg(value=("value", "mean"), n=("n", "sum"))

    first = side(test["a"])
    if "b" in test:
        pairs = first.merge(side(test["b"]), on=keys, suffixes=("_a", "_b"))
    else:
        pairs = first.rename(columns={"value": "value_a", "n": "n_a"}).assign(value_b=test["constant"], n_b=0)
    settings = pairs[[k for k in keys if k != "seed"]].astype(str).agg("/".join, axis=1)
    if len(pairs) < claim.get("min_n", 1):
        return Verdict(VERDICTS[3], None, None, None, len(pairs),
                       f"{len(pairs)} pairs of cells, at least {claim.get('min_n', 1)} are needed")
    clusters = pd.factorize(settings)[0]
    sign = -1.0 if test.get("direction", "greater") == "less" else 1.0
    effect, low, high = paired_bootstrap(pairs.value_a.to_numpy(float), pairs.value_b.to_numpy(float),
                                         pairs[["n_a", "n_b"]].to_numpy(int), clusters, rng(0, "claim", claim["id"]))
    if sign < 0:
        effect, low, high = -effect, -high, -low
    margin = test.get("margin", 0.0)
    verdict = VERDICTS[0] if low > margin else VERDICTS[1] if high < margin else VERDICTS[2]
    return Verdict(verdict, effect, low, high, len(pairs), f"asks for an effect above {margin:g}")


def judge_all(claims: list[dict], cells: pd.DataFrame, paper: str, scale: str) -> pd.DataFrame:
    """`claims.csv`: one row per claim of a paper, with the columns `COLUMNS`; rows of other papers play no part."""
    own, rows = cells[cells.paper == paper], []
    for claim in claims:
        found, test = judge(claim, own, scale), claim["test"]
        rows.append({"paper": paper, "claim": claim["id"], "statement": claim["statement"], "source": claim["source"],
                     "scale": scale, "verdict": found.verdict, "effect": found.effect, "low": found.low,
                     "high": found.high, "unit": f"difference in {test['metric']} ({test.get('unit', 'fraction')})",
                     "n": found.n, "test": found.reason})
    return pd.DataFrame(rows, columns=COLUMNS)
