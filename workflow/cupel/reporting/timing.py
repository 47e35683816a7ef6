"""Where the time of a run went: by rule, and along its critical path, which more cores do not shorten."""

from pathlib import Path

import pandas as pd

from cupel.files import benchmarks
from cupel.plan import ends, kept_graph
from cupel.reporting.terminal import job_words


def rule_times(folder: str | Path) -> pd.DataFrame:
    """Jobs, summed and longest wall seconds, and largest memory of each rule, from `benchmark:` files."""
    rows = [{"rule": file.stem, "seconds": float(row["s"]), "memory_mb": pd.to_numeric(row.get("max_rss"), errors="coerce")}
            for file, row in benchmarks(folder)]
    table = pd.DataFrame(rows, columns=["rule", "seconds", "memory_mb"])
    return table.groupby("rule").agg(jobs=("seconds", "size"), seconds=("seconds", "sum"), longest=("seconds", "max"),
                                     memory_mb=("memory_mb", "max")).reset_index()


def critical_path(folder: str | Path) -> list[dict]:
    """The chain of jobs, each of which waits for the one before, that takes longest.

    Args:
        folder: with benchmark files and the graph; without the graph there is no path.

    Returns:
        `job` in words, `begin` and `seconds` of each; those that took less than a second, or were not measured, are left out.
    """
    jobs = kept_graph(folder)
    took = {str(file): float(row["s"]) for file, row in benchmarks(Path(folder).parent)}
    seconds = [took.get(job.benchmark, 0.0) for job in jobs]
    ended, path = ends(jobs, seconds), []
    place = max(range(len(jobs)), key=ended.__getitem__, default=None)
    while place is not None:
        job = jobs[place]
        path.append({"job": job_words(job.rule, dict(job.wildcards), job.cells),
                     "begin": ended[place] - seconds[place], "seconds": seconds[place]})
        place = max(job.after, key=ended.__getitem__, default=None)
    return [step for step in reversed(path) if step["seconds"] >= 1]
