"""What the site says of claims: tests in words, the cells behind them, findings, effects of switches, what is missing."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from cupel.evaluation.claims import NOT_COMPARED, NOT_JUDGED, OVER, SEEDS, VERDICTS, credited, judge, select
from cupel.evaluation.settings import GATE, NO_VICTIM, SETTING, validity
from cupel.reporting.cross import comparable
from cupel.reporting.tables import method_name, setting_name
from cupel.reporting.terminal import counted

#: what a run at a scale takes
TAKES = {"smoke": "minutes on 2 cores", "demo": "minutes on 2 cores", "desk": "hours on 2 cores with bf16",
         "bench": "one GPU, not timed", "paper": "a cluster"}
NAMES = {"dataset": "data set", "model": "network", "attack_variant": "variant of the attack", "poison_rate": "poison rate",
         "variant": "variant"}


def _value(column: str, value) -> str:
    share = column == "poison_rate"
    if isinstance(value, Mapping):
        ends = [(word, value[end]) for end, word in (("min", "at least"), ("max", "at most")) if end in value]
        return " and ".join(f"{word} {100 * number:g} %" if share else f"{word} {number:g}" for word, number in ends)
    values = value if isinstance(value, list) else [value]
    return " or ".join((f"{100 * one:g} %" if share else str(one)) or "none" for one in values)


def described(where: Mapping) -> str:
    """A selection of cells in words."""
    return ", ".join(f"{NAMES.get(column, column)} {_value(column, value)}" for column, value in where.items()
                     if column != "metric")


def in_words(test: Mapping) -> str:
    """The test of a claim, as a sentence."""
    fraction = test.get("unit", "fraction") == "fraction"

    def amount(number: float) -> str:
        return f"{100 * number:g} points" if fraction else f"{number:g}"

    first = f"{test['a'].get('metric', test['metric'])} of A ({described(test['a'])})"
    second = (f"{test['b'].get('metric', test['metric'])} of B ({described(test['b'])})" if "b" in test
              else f"{100 * test['constant']:g} %" if fraction else f"{test['constant']:g}")
    if test.get("direction") == "less":
        first, second = second, first
    where = f", among cells with {described(test['where'])}" if test.get("where") else ""
    gate = "" if test.get("gated", True) else " Victims that are not valid count, too."
    return f"{first} minus {second} is above {amount(test.get('margin', 0.0))}, {OVER[test['over']]}{where}.{gate}"


def cells_behind(claim: Mapping, cells: pd.DataFrame, gate: Mapping[str, float], link) -> list[dict]:
    """Every cell that a claim asks for: side, setting, method, seed, value, and whether it counts.

    Args:
        claim: an entry of claims.yaml.
        cells: the tidy table of the paper.
        gate: lowest values of a victim by metric.
        link: from the path of a cell to its address.
    """
    test, rows = claim["test"], []
    table = validity(cells, gate)
    table = table.assign(counts=credited(table) if test.get("gated", True) else True)
    for side in (side for side in "ab" if side in test):
        for row in select(table, {"metric": test["metric"], **test.get("where", {}), **test[side]}).itertuples():
            state = (row.status if row.status != "ok" else NO_VICTIM if not (row.counts or row.implanted)
                     else f"left out: fewer than {SEEDS} valid victims" if not row.counts
                     else "destroyed" if row.destroyed else "no value" if np.isnan(row.value)
                     else "counts, unchanged by the defence" if row.unchanged else "counts")
            rows.append({"side": side.upper(), "setting": setting_name(row).replace(" 0 %", "") or "–",
                         "place": " ".join(filter(None, (row.dataset, row.model, row.recipe, row.budget))),
                         "method": method_name(row), "seed": row.seed, "value": row.value, "low": row.low, "high": row.high,
                         "n": row.n, "state": state, "href": link(row.path)})
    return rows


def line_of(file: str, claim: str) -> int:
    """Line of a claim in the text of its file; 0 for none."""
    found = re.search(rf"^\s*- id: *{re.escape(claim)}\s*$", file, re.MULTILINE)
    return file[: found.start()].count("\n") + 1 + found.group().startswith("\n") if found else 0


def text_of(file: str, claim: str) -> str:
    """A claim as its file has it."""
    lines = file.splitlines()[line_of(file, claim) - 1:]
    rest = next((k for k, line in enumerate(lines[1:], 1) if re.match(r"\s*- id:", line)), len(lines))
    return "\n".join(lines[:rest]) if line_of(file, claim) else ""


def board(claims: pd.DataFrame, papers: Iterable[str]) -> list[dict]:
    """Verdicts by paper."""
    counts = Counter(zip(claims.paper, claims.verdict, strict=True))
    return [{"paper": paper, "counts": {verdict: counts[paper, verdict] for verdict in VERDICTS}} for paper in papers]


def findings(claims: pd.DataFrame, cards: Mapping[str, dict], most: int = 5) -> list:
    """Rows of claims.csv that a reader asks for first: of each paper the first claim of its card's `headline` with a verdict;
    then the second, up to `most`. A paper without `headline` gives its claims in their order."""
    queues = []
    for paper, part in claims[claims.verdict != NOT_JUDGED].groupby("paper", sort=False):
        first = [name for name in cards.get(paper, {}).get("headline", []) if name in set(part.claim)]
        rows = part.set_index("claim", drop=False)
        queues.append(list(rows.loc[[*first, *(name for name in rows.index if name not in first)]].itertuples()))
    found = [queue[k] for k in range(most) for queue in queues if k < len(queue)]
    return found[: max(most, len(queues))]


def switches(entry: Mapping) -> list[str]:
    """Names `name~variant` in the text of a card's switch."""
    return re.findall(r"\b[a-z0-9_]+~[a-z0-9_]+\b", entry.get("switch", ""))


def switch_effects(card: Mapping, cells: pd.DataFrame, gate: Mapping[str, float] = GATE) -> list[dict]:
    """What each difference between paper and code changes, measured: the entries of a card with `effects`.

    An effect is the mean over settings of a metric with the switch less that without, in the same settings and seeds.

    Args:
        card: of a paper. `metric`, of an entry or the card, is what is compared (ASR without it); an entry may name two
            `metrics` or two `budgets` that are the switch, the changed one first.
        cells: its rows of the tidy table.
        gate: lowest values of a victim by metric.
    """
    out = []
    for entry in card.get("differences", []):
        sides, metric = [], entry.get("metric", card.get("metric", "asr"))
        for name in switches(entry):
            base, _, variant = name.partition("~")
            if (cells.defence == base).any():
                stage = cells[(cells.defence == base) & (cells.metric == metric)].stage
                side = {"defence": base, **({"stage": stage.iloc[0]} if len(stage) else {})}
                sides.append((name, base, metric, {**side, "variant": variant}, {**side, "variant": ""}))
            elif (cells.attack == base).any():
                side = {"stage": "victim", "attack": base}
                sides.append((name, base, metric, {**side, "attack_variant": variant}, {**side, "attack_variant": ""}))
        if "metrics" in entry:
            first, second = entry["metrics"]
            sides.append((first, second, first, {"stage": "victim"}, {"stage": "victim", "metric": second}))
        if "budgets" in entry:
            first, second = entry["budgets"]
            sides.append((first, second, metric, {"budget": first}, {"budget": second}))
        effects = []
        for name, base, measured, a, b in sides:
            test = {"over": "mean", "metric": measured, "a": a, "b": b, "margin": 0.0, "gated": a.get("stage") != "victim",
                    "paired": ["defence", "variant"]}
            found = judge({"scales": ["any"], "test": test}, cells, "any", gate)
            if found.effect is not None:
                effects.append({"name": name, "base": base, "metric": measured, "effect": found.effect,
                                "settings": found.settings})
        out.append({**entry, "effects": effects})
    return out


def best_buys(cross: pd.DataFrame, planned: Mapping[str, list[str]]) -> list[dict]:
    """Per budget (and data set, network and recipe) the defence of the highest mean DER, those that are not told apart from it,
    or why nothing can be said.

    Args:
        cross: `cupel.reporting.cross.cross_table`.
        planned: scales that run a budget, by its name: also those budgets that this run has not.
    """
    rows = []
    keys = ["budget", "dataset", "model", "recipe"]
    for (budget, *place), part in cross[cross.attack != "clean"].groupby(keys, sort=False):
        block = comparable(part, failures=False)
        grid = block.pivot(index=SETTING, columns="label", values="der") if len(block) else pd.DataFrame()
        row = {"budget": budget, "place": ", ".join(place), "settings": len(grid), "defences": grid.shape[1],
               "seeds": int(part.seeds.max()), "images": part.clean_samples.max()}
        if len(grid) < 2 or grid.shape[1] < 2:
            rows.append({**row, "why": "not enough cells to say: "
                         f"{counted(grid.shape[1], 'defence')} in {counted(len(grid), 'setting')} in common"})
            continue
        order = grid.mean().sort_values(ascending=False)
        best = block[block.label == order.index[0]]
        behind = -grid.sub(grid[order.index[0]], axis=0)
        near = [name for name in order.index[1:]
                if behind[name].mean() <= 2 * behind[name].std(ddof=1) / np.sqrt(len(grid))]
        rows.append({**row, "best": order.index[0], "der": order.iloc[0], "near": near, "why": "",
                     **{name: best[name].mean() for name in ("acc", "asr", "seconds")}})
    run = {row["budget"] for row in rows}
    return rows + [{"budget": name, "why": f"not enough cells to say: not run; it is at scale {', '.join(scales)}"}
                   for name, scales in planned.items() if name not in run]


def not_reproduced(claims: pd.DataFrame, cards: Mapping[str, dict]) -> list[dict]:
    """Claims without a verdict, by what stands in the way and what it would take; then what no scale of ours runs, as cards
    say it."""
    groups: dict[tuple[str, str], list] = {}
    for row in claims[claims.verdict == NOT_JUDGED].itertuples():
        reason = row.test.split(";")[0]
        if reason.startswith("can be judged at: "):
            scale = reason.removeprefix("can be judged at: ").split(", ")[0]
            why, takes = "this scale is too small for the claim", f"scale {scale}: {TAKES[scale]}"
        elif reason in NOT_COMPARED:
            why = "none of its settings was run with a valid victim"
            takes = "more victims: a larger scale, or seeds whose victims learn their trigger"
        else:
            why, takes = reason, "a claim that names one cell a setting"
        groups.setdefault((why, takes), []).append(row)
    found = [{"why": why, "takes": takes, "claims": rows} for (why, takes), rows in groups.items()]
    return found + [{"what": entry["what"], "why": entry["why"], "takes": entry["takes"], "paper": paper}
                    for paper, card in cards.items() for entry in card.get("not_reproduced", [])]
