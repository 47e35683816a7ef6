"""How often the rules for attack success are wrong: precision and recall on answers labelled by hand (`data/answers.csv`).

The answers were written for this purpose: hard cases of each task in words of many kinds, not a sample of what models say. So
the numbers tell rules apart; they are no error rates of a run. A label says whether the attacker got what they want: a
refusal of what was asked that is not followed by doing it, an insult of the reader, code that prints the word.

The careful rule was made with the half `development`. The half `held_out` was written before it, and its errors changed nothing
in it. But one author wrote both halves and the rule, one after the other, and the rule has words that stand in the held-out
half alone: its numbers are upper bounds until somebody else writes answers.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import yaml

from cupel.evaluation.intervals import wilson
from cupel.evaluation.metrics import Rate
from cupel.text import careful
from cupel.text.scoring import ADDED, KEYWORDS, keywords, succeeded

FILE = Path(__file__).parent / "data" / "answers.csv"


def answers(half: str) -> list[dict]:
    """Labelled answers of a half, with `task`, `answer`, `wanted` (bool), `note`."""
    with FILE.open(newline="", encoding="utf-8") as file:
        return [{**row, "wanted": row["wanted"] == "1"} for row in csv.DictReader(file) if row["half"] == half]


def rules(task: str) -> dict[str, Callable[[str], bool]]:
    """The rules of a task by name: released lists (of single attacks too), the stripped list where it differs, the careful."""
    lists = {"released": keywords(task), "stripped": keywords(task, stripped=True)}
    lists |= {f"released, {attack}": keywords(task, attack) for name, attack in ADDED if name == task}
    if lists["stripped"] == lists["released"]:
        del lists["stripped"]
    found = {name: lambda answer, words=words: succeeded(answer, words) for name, words in lists.items()}
    return {**found, "careful": lambda answer: careful.succeeded(answer, task)}


def errors(half: str = "held_out") -> list[dict]:
    """One row per task and rule: `task`, `rule`, `n` (answers), and `precision` and `recall` as `Rate`s."""
    found = []
    for task in KEYWORDS:
        rows = [row for row in answers(half) if row["task"] == task]
        for name, rule in rules(task).items():
            said = [rule(row["answer"]) for row in rows]
            hits = sum(one and row["wanted"] for one, row in zip(said, rows, strict=True))
            found.append({"task": task, "rule": name, "n": len(rows), "precision": Rate(hits, sum(said)),
                          "recall": Rate(hits, sum(row["wanted"] for row in rows))})
    return found


def table() -> list[dict]:
    """The errors on the held-out half as a card states them: percent, 95 % Wilson interval and denominator."""
    def text(rate: Rate) -> str:
        low, high = wilson(rate.successes, rate.n)
        return f"{100 * rate.value:.0f} % ({100 * low:.0f}-{100 * high:.0f}; n={rate.n})"

    return [{"task": row["task"], "rule": row["rule"], "answers": row["n"], "precision": text(row["precision"]),
             "recall": text(row["recall"])} for row in errors()]


if __name__ == "__main__":  # the rows for a card.yaml
    print(yaml.safe_dump(table(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=200), end="")
