"""Machine-checked claims: a statement, a test over the tidy table, a verdict with an interval."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cupel.evaluation.settings import GATE, NO_VICTIM, NOT_RUN, SETTING, VICTIM, validity
from cupel.evaluation.variation import Effect, least_effect, mean_effect

#: trainings of every setting that a verdict rests on
SEEDS = 3
SUPPORTED, REFUTED, INDICATED, OPEN, NOT_JUDGED = VERDICTS = ("supported", "refuted", "indicated", "open", "not judged")
#: why nothing could be compared
NOT_COMPARED = NO_CELLS, NO_SEED = "no cells to compare", "no seed that every setting has"
COLUMNS = ["paper", "claim", "statement", "source", "scale", "verdict", "direction", "effect", "low", "high", "unit", "n",
           "settings", "seeds", "least", "least_in", "test"]
#: what tells cells apart; cells of one setting and seed that differ in one of these are averaged only if the claim says so
TOLD_APART = ["stage", *SETTING, "defence", "variant"]


@dataclass(frozen=True)
class Verdict:
    """Outcome of a claim.

    Attributes:
        verdict: one of `VERDICTS`.
        reason: what was asked, what was left out, what stands in the way.
        effect: with its interval, in the unit of the test; None where nothing could be compared.
        direction: `for` or `against`: on which side of the margin the effect lies.
        n: pairs of cells behind it, in `settings` settings.
        least, least_in: effect in the setting where it is least, and that setting.
    """

    verdict: str
    reason: str
    effect: Effect | None = None
    direction: str = ""
    n: int = 0
    settings: int = 0
    least: float | None = None
    least_in: str = ""


def select(cells: pd.DataFrame, where: Mapping) -> pd.DataFrame:
    """Rows of the tidy table that match `where`: a value, a list of values, or {min:, max:} for numbers."""
    keep = pd.Series(True, index=cells.index)
    for column, wanted in where.items():
        if isinstance(wanted, Mapping):
            number = cells[column].astype(float)
            keep &= (number >= wanted.get("min", -np.inf)) & (number <= wanted.get("max", np.inf))
        else:
            keep &= cells[column].isin(wanted if isinstance(wanted, list) else [wanted])
    return cells[keep]


def one_side(rows: pd.DataFrame, keys: list[str], pooled: list[str]) -> pd.DataFrame:
    """Value and standard error from the finite test set, one row per `keys` and seed.

    Means are taken over `pooled` columns only, and over the same cells with every seed.

    Raises:
        ValueError: several cells for one setting and seed.
    """
    differ = [column for column in TOLD_APART if column not in [*keys, *pooled]
              and (rows.groupby([*keys, "seed"], dropna=False)[column].nunique() > 1).any()]
    if differ:
        raise ValueError(f"several cells for one setting and seed, which differ in {', '.join(differ)}: "
                         "select one, or name the columns in `paired` or `pooled`")
    inner = [*keys, *(column for column in pooled if column not in keys)]
    seeds = rows.groupby(keys, dropna=False).seed.transform("nunique")
    whole = rows[rows.groupby(inner, dropna=False).seed.transform("nunique") == seeds] if pooled else rows
    whole = whole.assign(error=((whole.high - whole.low) / 3.92).fillna(0.0))  # bounds of 95 %
    return whole.groupby([*keys, "seed"], dropna=False, as_index=False).agg(value=("value", "mean"), error=("error", "mean"))


def compared(test: Mapping, table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Pairs of cells: the columns of a setting, `seed`, `effect` (A − B, or B − A for `direction: less`) and its `error`.

    Both sides are paired on the columns of a setting and on those in `paired`, but for those that a side selects, those in
    `unpaired`, and the budget where a side has none (victims).
    """
    where, named = {"metric": test["metric"], **test.get("where", {})}, {*test["a"], *test.get("b", {})}
    selections = [{**where, **test[side]} for side in "ab" if side in test]
    sides = [select(table, selection) for selection in selections]
    budgets = [set(side.budget) != {""} for side in sides]
    keys = [column for column in dict.fromkeys([*SETTING, *test.get("paired", [])])
            if column not in named and column not in test.get("unpaired", []) and (column != "budget" or all(budgets))]
    if not all(budgets) and any(budgets) and "budget" not in named:  # each budget of a defence beside one victim
        keys.append("budget")
    pooled = [*test.get("pooled", []), *test.get("unpaired", [])]
    own = [[column for column in keys if column != "budget" or has] for has in budgets]
    first, *others = (one_side(side, mine, pooled) for side, mine in zip(sides, own, strict=True))
    if others:
        on = [column for column in keys if all(column in mine for mine in own)]
        pairs = first.merge(others[0], on=[*on, "seed"], suffixes=("_a", "_b"))
    else:
        pairs = first.rename(columns={"value": "value_a", "error": "error_a"}).assign(value_b=test["constant"], error_b=0.0)
    sign = -1.0 if test.get("direction") == "less" else 1.0
    return pairs.assign(effect=sign * (pairs.value_a - pairs.value_b), error=np.hypot(pairs.error_a, pairs.error_b)), keys


def credited(cells: pd.DataFrame) -> pd.Series:
    """Rows whose victim has its backdoor, in settings where all victims have, or `SEEDS` of them."""
    victims = cells.drop_duplicates([*VICTIM, "seed"]).groupby(VICTIM, dropna=False).implanted
    usable = (victims.all() | (victims.sum() >= SEEDS)).rename("usable")
    return cells.implanted & cells[VICTIM].merge(usable.reset_index(), how="left", on=VICTIM).usable.to_numpy()


def judge(claim: Mapping, cells: pd.DataFrame, scale: str, gate: Mapping[str, float] = GATE) -> Verdict:
    """Judge one claim.

    The test compares a metric (a side may name another) of side A with that of side B, or with a constant, and asks for an
    effect A − B above a margin: in the mean over settings (`over: mean`), or in every one of them (`over: every`). The verdict
    is `supported` when the whole interval lies above the margin, `refuted` when it lies below, else `open`. It is never more
    than `indicated` with fewer than `SEEDS` trainings of a setting, with fewer settings than the claim's `min_settings`, and
    while cells that it asks for were not run; but one setting that lies below refutes a claim about every one, however many
    others there are. Seeds that not all settings have are left out.

    Left out are cells whose victim does not reach `gate` (unless the claim says `gated: false`): they earn nobody credit. Where
    this leaves fewer than `SEEDS` trainings of a setting, it is left out as a whole. A claim is neither supported nor indicated
    while cells that it asks for failed, or rest on a destroyed network. Destroyed networks of a side that names several
    defences, those that a claim compares with, count as measured.

    Args:
        claim: an entry of claims.yaml (schemas/claims.schema.yaml).
        cells: the tidy table of one paper.
        scale: name.
        gate: lowest values of a victim by metric.
    """
    if scale not in claim["scales"]:
        return Verdict(NOT_JUDGED, f"can be judged at: {', '.join(claim['scales'])}")
    test, cells = claim["test"], validity(cells, gate)
    cells = cells.assign(credited=credited(cells) if test.get("gated", True) else True)
    where = test.get("where", {})
    sides = [{**where, **test[side]} for side in "ab" if side in test]
    asked = pd.concat([select(cells, side) for side in sides]).drop_duplicates(["path", "metric"])
    of_one = [side for side in sides if not isinstance(side.get("defence"), list)]  # the others are what it is compared with
    claimed = pd.concat([select(cells, side) for side in of_one or sides]).path
    measured = (cells.status == "ok") & cells.value.notna()
    lists = [[side[column] for side in sides if isinstance(side.get(column), list)] for column in test.get("pooled", [])]
    if (asked.status == NOT_RUN).any() and any(len(names) == 2 and len(names[0]) == len(names[1]) for names in lists):
        return Verdict(NOT_JUDGED, "two means over matched variants, some of which were not run")
    try:
        pairs, keys = compared(test, cells[measured & cells.credited])
    except ValueError as error:
        return Verdict(NOT_JUDGED, str(error))
    margin, notes = test.get("margin", 0.0), [f"asks for an effect above {test.get('margin', 0.0):g}, {OVER[test['over']]}"]
    weak, failed = asked[~asked.credited & ~asked.implanted], asked[asked.credited & (asked.status == "failed")]
    broken, absent = asked[asked.credited & asked.destroyed], asked[asked.status == NOT_RUN]
    for found, text, columns in ((weak, f"left out, {NO_VICTIM}", VICTIM), (failed, "failed", TOLD_APART[1:]),
                                 (broken, "destroyed", TOLD_APART[1:]), (absent, NOT_RUN, TOLD_APART[1:])):
        if len(found):
            notes.append(f"{text}: {'; '.join(_names(found, columns, asked))}")
    settings = pairs.groupby(keys, dropna=False, sort=False).ngroup() if keys else pd.Series(0, index=pairs.index)
    grid = pairs.assign(setting=settings).pivot(index="setting", columns="seed", values=["effect", "error"])
    shared = [seed for seed in sorted(set(pairs.seed)) if grid["effect"][seed].notna().all()] if len(pairs) else []
    if not shared:
        lacks = NO_SEED if len(grid) else NO_CELLS
        return Verdict(NOT_JUDGED, "; ".join([lacks, *notes[1:]]), n=len(pairs), settings=len(grid))
    values, errors = (grid[name][shared].to_numpy(float) for name in ("effect", "error"))
    found = {"mean": mean_effect, "every": least_effect}[test["over"]](values, errors)
    least = pairs[settings == grid.index[found.least]].iloc[:1]
    verdict = SUPPORTED if found.low > margin else REFUTED if found.high < margin else OPEN
    counterexample = test["over"] == "every" and verdict == REFUTED
    few = len(grid) < claim.get("min_settings", 1) and not counterexample
    if few:
        notes.append(f"no more than indicated with fewer than {claim['min_settings']} settings")
    if found.value > margin and (len(failed) or broken.path.isin(claimed).any()):
        verdict = OPEN
    elif (len(shared) < SEEDS or few or (len(absent) and not counterexample)) and not found.low <= margin <= found.high:
        verdict = INDICATED  # also where one training of a metric without counts has no interval
    return Verdict(verdict, "; ".join(notes), found, "for" if found.value > margin else "against", values.size, len(grid),
                   float(values.mean(1).min()), _names(least, keys, pairs, seeds=False)[0])


#: how sure a verdict is
SURE = {SUPPORTED: "Holds here", REFUTED: "Does not hold here", OPEN: "Undecided", NOT_JUDGED: "Not judged",
        (INDICATED, "for"): "Points that way, not established", (INDICATED, "against"): "Points against it, not established"}
#: how a claim speaks of its settings
OVER = {"mean": "in the mean over settings", "every": "in every setting"}


def sureness(row) -> str:
    """How sure the verdict of a row of claims.csv is, in words."""
    return SURE.get((row.verdict, row.direction)) or SURE[row.verdict]


def _names(rows: pd.DataFrame, columns: list[str], among: pd.DataFrame, seeds: bool = True) -> list[str]:
    """Settings in words, by the columns that differ `among` all, with their seeds."""
    shown = [column for column in columns if column in rows and among[column].nunique() > 1]
    texts = [" ".join(f"{100 * value:g} %" if name == "poison_rate" else str(value)
                      for name, value in row.items() if value != "") or "all" for row in rows[shown].to_dict("records")]
    found = rows.seed.groupby(texts, sort=False).apply(lambda seed: ", ".join(map(str, sorted(set(seed)))))
    return [f"{text} (seed {numbers})" if seeds else text for text, numbers in found.items()]


def judge_all(content: Mapping, cells: pd.DataFrame, paper: str, scale: str) -> pd.DataFrame:
    """`claims.csv`: one row per claim of a paper, with the columns `COLUMNS`; rows of other papers play no part.

    Args:
        content: of claims.yaml: `claims`, and `gate` where it is not `cupel.evaluation.settings.GATE`.
    """
    own, rows = cells[cells.paper == paper], []
    for claim in content["claims"]:
        found, test = judge(claim, own, scale, content.get("gate", GATE)), claim["test"]
        effect = found.effect
        rows.append({"paper": paper, "claim": claim["id"], "statement": claim["statement"], "source": claim["source"],
                     "scale": scale, "verdict": found.verdict, "direction": found.direction,
                     "effect": effect and effect.value, "low": effect and effect.low, "high": effect and effect.high,
                     "unit": f"difference in {test['metric']} ({test.get('unit', 'fraction')})", "n": found.n,
                     "settings": found.settings, "seeds": effect.seeds if effect else 0, "least": found.least,
                     "least_in": found.least_in, "test": found.reason})
    return pd.DataFrame(rows, columns=COLUMNS)
