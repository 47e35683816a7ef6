"""What may be averaged, and what counts: settings, victims that carry their backdoor, networks that a defence destroyed.

A *setting* is everything about a measured model but its seed. Tables, figures and claims take means over the seeds of one
setting; whoever averages over more says so.
"""

from collections.abc import Mapping

import pandas as pd

from cupel.evaluation.metrics import KEPT, USE

VICTIM = ["dataset", "model", "recipe", "attack", "attack_variant", "poison_rate"]
SETTING = [*VICTIM, "budget"]
#: a victim with less of one of these has no backdoor to remove, or is no classifier; what was not measured says nothing
GATE = {"asr": 0.8, "acc": 0.2}
#: what readers are told of its cells. Their numbers are numbers, so their status is ok; they are in no mean and no verdict
NO_VICTIM = "no valid victim"
#: status of a cell that a report asks for and whose job has not begun
NOT_RUN = "not run"


def validity(cells: pd.DataFrame, gate: Mapping[str, float] | None = None) -> pd.DataFrame:
    """The tidy table with three columns more.

    `implanted`: the row's victim was trained and reaches `gate`; True where no victim of its setting and seed is known.
    A victim without poison need not reach a gate on triggered samples. `destroyed`: a purified model with less than `KEPT`
    of its victim's use (`USE`). `unchanged`: one that is its victim to the bit; False in tables that do not know it.

    Args:
        cells: the tidy table (`cupel.reporting.tables.gather`).
        gate: lowest value by metric, of a metric `false_*` the highest, fractions; None: as the table says in `valid`, by the
            gate of each paper, else `GATE`.
    """
    known, gate = gate is None and "valid" in cells, gate or GATE
    keys = [*VICTIM, "seed"]
    rows = cells[cells.metric.isin([*gate, *USE])]
    victims = rows[rows.stage == "victim"].assign(
        bound=lambda found: found.metric.map(gate).astype(float)).query("poison_rate > 0 or metric == 'acc'")
    false = victims.metric.str.startswith("false_")
    beyond = victims.value.lt(victims.bound).where(~false, victims.value.gt(victims.bound))
    victims = victims.assign(below=victims.bound.notna() & ((victims.status == "failed") | beyond))
    found = victims.groupby(keys, as_index=False).agg(below=("below", "any"))
    before = rows[(rows.stage == "victim") & rows.metric.isin(USE)].drop_duplicates([*keys, "metric"])
    after = rows[rows.stage == "purified"].merge(before[[*keys, "metric", "value"]], on=[*keys, "metric"],
                                                 suffixes=("", "_before"))
    sign = after.metric.map(USE).astype(float)
    gone = set(after.path[after.value.astype(float) ** sign < KEPT * after.value_before.astype(float) ** sign])
    below = cells[keys].merge(found, how="left", on=keys).below.to_numpy()
    unchanged = cells.unchanged == True if "unchanged" in cells else False  # noqa: E712 (NaN: a failed cell)
    implanted = cells.valid if known else below != True  # noqa: E712 (NaN: no victim is known)
    return cells.assign(implanted=implanted, destroyed=cells.path.isin(gone), unchanged=unchanged)
