"""Do effects keep their direction from one training to the next, and from one precision to another?

    python benchmarks/seeds.py bf16=results/demo/cells.parquet fp32=elsewhere/demo/cells.parquet [--scale demo]
                               [--claims fst-beats-ft ...]

Every claim is judged on each seed alone. Prints a table: by claim and run the effect with each seed, above or below the line
that the claim asks for.
"""

import argparse

import pandas as pd

from cupel.evaluation.claims import judge_all
from cupel.settings import PAPERS, read_yaml


def effects(run: str, cells: pd.DataFrame, scale: str) -> pd.DataFrame:
    """Effects of every seed alone, less the margin, in points where they compare shares; with the name of the run."""
    found = []
    for paper in cells.paper.unique():
        content = read_yaml(PAPERS / paper / "claims.yaml")
        margins = {claim["id"]: claim["test"]["margin"] for claim in content["claims"]}
        for seed, part in cells[cells.paper == paper].groupby("seed"):
            rows = judge_all(content, part, paper, scale).dropna(subset="effect")
            beyond = rows.effect.astype(float) - rows.claim.map(margins).astype(float)
            beyond *= rows.unit.str.contains("fraction").map({True: 100, False: 1}).astype(float)
            found.append(rows[["paper", "claim", "statement"]].assign(run=run, seed=seed, beyond=beyond.round(2)))
    return pd.concat(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE", help="the tidy table of a run")
    parser.add_argument("--claims", nargs="+", help="default: all that can be judged")
    parser.add_argument("--scale", default="demo", help="of the runs: a claim is judged at the scales that it names")
    asked = parser.parse_args()
    runs = (run.partition("=") for run in asked.runs)
    rows = pd.concat(effects(name, pd.read_parquet(file), asked.scale) for name, _, file in runs)
    rows = rows[rows.claim.isin(asked.claims)] if asked.claims else rows
    rows = rows.assign(beyond=rows.beyond.map("{:+.3g}".format))
    texts = rows.groupby(["paper", "statement", "run"], sort=False).beyond.agg(", ".join).unstack(fill_value="")
    print(texts.reset_index().to_markdown(index=False))
