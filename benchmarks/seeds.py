"""Do effects keep their direction from one training to the next, and from one precision to another?

    python benchmarks/seeds.py bf16=results/demo/cells.parquet fp32=elsewhere/demo/cells.parquet [--claims fst-beats-ft ...]

Every claim is judged on each seed alone. A row gives its effect with each seed, and on how many it lies on the side of the
margin that the claim asks for. `--out` writes the rows, one for each claim, run and seed, as CSV.
"""

import argparse
from pathlib import Path

import pandas as pd

from cupel.evaluation.claims import judge_all
from cupel.settings import read_yaml

PAPERS = Path(__file__).parents[1] / "workflow" / "papers"


def effects(label: str, cells: pd.DataFrame) -> pd.DataFrame:
    """The verdicts of every seed alone, with the name of the run and the seed."""
    found = []
    for paper in cells.paper.unique():
        claims = read_yaml(PAPERS / paper / "claims.yaml")
        for seed, part in cells[cells.paper == paper].groupby("seed"):
            found.append(judge_all(claims, part, paper, "demo").assign(run=label, seed=seed))
    return pd.concat(found).dropna(subset="effect")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE", help="the tidy table of a run")
    parser.add_argument("--claims", nargs="+", help="default: all that can be judged")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = pd.concat(effects(label, pd.read_parquet(file)) for label, _, file in (run.partition("=") for run in asked.runs))
    rows = rows[rows.claim.isin(asked.claims)] if asked.claims else rows
    rows = rows[["paper", "claim", "run", "seed", "effect", "direction", "unit"]]
    if asked.out:
        asked.out.write_text(rows.round(4).to_csv(index=False))
    for (paper, claim, run), part in rows.groupby(["paper", "claim", "run"], sort=False):
        numbers = ", ".join(f"{effect:+.3f}" for effect in part.effect)
        print(f"| {paper} | {claim} | {run} | {numbers} | {(part.direction == 'for').sum()} of {len(part)} for |")
