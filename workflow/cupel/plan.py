"""What a scale will take before anything is run: jobs from Snakemake's own graph, times from benchmark files.

    make plan SCALE=paper PAPERS="fst ims"       or: python -m cupel.plan --scale paper --papers fst ims

The time of a job is the median of those of its rule that were measured at this scale and are like it: in all but the seed, else
in all but the poison rate, else in all but the attack, else in data set and model. What was measured at another scale is shown,
and counts nowhere. What was not measured is unknown.
"""

import argparse
import csv
import functools
import gc
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from re import Pattern

from cupel.experiment import SCALES, Grid
from cupel.files import benchmarks, read_json, write_json, write_text
from cupel.reporting.terminal import duration
from cupel.settings import LIBRARY, ConfigError, check_schema, read_yaml, schema

#: scales whose training is meant for a GPU: hours on processors would be no plan
GPU_SCALES = ("bench", "paper")
#: beside the benchmark files of a scale
GRAPH = "jobs.json"
COSTS = LIBRARY.parents[1] / "docs" / "results" / "costs.csv"


@dataclass(frozen=True)
class Job:
    """A job of the graph."""

    rule: str  # its name; that of `purify` for the rules that do all defences of one victim
    wildcards: frozenset[tuple[str, str]] = frozenset()  # (name, value); those that all its cells share
    cells: int = 1  # how many it makes; 1 where they are not counted
    threads: int = 1  # cores that it takes
    gpu: bool = False  # whether it asks for one, where there is one
    todo: bool = True  # whether it will be run; else it is done
    benchmark: str = ""  # file of its time; empty: none
    after: tuple[int, ...] = ()  # places in the list of jobs of those it waits for


@dataclass(frozen=True)
class Cost:
    """Seconds of wall time that one job took; see `Job`."""

    rule: str
    scale: str  # empty where the rule is the same at all scales
    wildcards: frozenset[tuple[str, str]]
    cells: int
    seconds: float
    hardware: str = ""  # processor and GPU; empty: of this results folder


def graph(config: Mapping, cores: int) -> tuple[list[Job], dict[str, Pattern]]:
    """Jobs of a dry run in the working folder, and the benchmark path of each rule as a regular expression of its wildcards.

    Raises:
        snakemake.exceptions.WorkflowError: Snakemake refuses the run.
    """
    from snakemake.api import SnakemakeApi
    from snakemake.settings import types
    from snakemake.settings.types import ConfigSettings, DAGSettings, ExecutionSettings, OutputSettings, ResourceSettings

    # with just these two Snakemake ends a dry run once the graph is made, as with `-n -q rules progress`
    output = OutputSettings(dryrun=True, quiet={types.Quietness.RULES, types.Quietness.PROGRESS}, log_level_override="ERROR")
    with SnakemakeApi(output) as api:
        triggers = frozenset(types.RerunTrigger) - {types.RerunTrigger.CODE}  # as in profiles/default
        run = api.workflow(resource_settings=ResourceSettings(cores=cores), config_settings=ConfigSettings(config=config))
        dag = run.dag(DAGSettings(rerun_triggers=triggers))
        dag.execute_workflow(executor="dryrun", execution_settings=ExecutionSettings(lock=False))
        gc.enable()  # the Snakefile plans without
        jobs, patterns = jobs_of(run._workflow)  # the API prints graphs, and hands none out
        return list(jobs.values()), patterns


def jobs_of(workflow) -> tuple[dict, dict[str, Pattern]]:
    """Jobs of Snakemake's `workflow`, whose graph is made, by its own; and benchmark paths of rules as in `graph`."""
    dag = workflow.dag
    parents = [rule for rule in workflow.rules if rule.has_wildcards()]

    @functools.cache
    def parent(rule):
        """The rule with wildcards of which this one is a case: same script, and its name begins this one's."""
        return None if rule.has_wildcards() else next(
            (known for known in parents if rule.script == known.script and rule.name.startswith(f"{known.name}_")), None)

    def made(job) -> Job:
        rule, wildcards, cells = job.rule.name, frozenset(job.wildcards_dict.items()), 1
        like = parent(job.rule)
        found = {frozenset(match.groupdict().items()) for pattern in (like.output if like else []) for file in job.output
                 if (match := pattern.match(file))}
        if found:
            rule, wildcards, cells = like.name, frozenset.intersection(*found), len(found)
        return Job(rule, wildcards, cells, job.threads, bool(job.resources.get("gpu")), dag.needrun(job),
                   str(job.benchmark or ""), tuple(places[other] for other in dag.dependencies[job] if other in places))

    jobs = [job for job in dag.jobs if not job.is_norun]
    places = {job: place for place, job in enumerate(jobs)}
    patterns = {rule.name: rule.benchmark.regex() for rule in workflow.rules if rule.benchmark and not parent(rule)}
    return {job: made(job) for job in jobs}, patterns


def keep_graph(folder: str | Path, jobs: Iterable[Job]) -> None:
    """Write the jobs of a run beside its benchmark files."""
    write_json(Path(folder) / GRAPH, [vars(job) | {"wildcards": sorted(job.wildcards)} for job in jobs])


def kept_graph(folder: str | Path) -> list[Job]:
    """The jobs of the last run; none where it is not known."""
    file = Path(folder) / GRAPH
    return [Job(**job | {"wildcards": frozenset(map(tuple, job["wildcards"])), "after": tuple(job["after"])})
            for job in (read_json(file) if file.is_file() else [])]


def measured(results: str | Path, scale: str, jobs: Iterable[Job], patterns: Mapping[str, Pattern]) -> list[Cost]:
    """Times in `<results>/benchmark`: of these jobs, and of others of the rules, also at other scales."""
    known, found = {job.benchmark: job for job in jobs}, []
    top = Path(results) / "benchmark"
    for file, row in benchmarks(top):
        first, *rest = file.relative_to(top).parts
        job = known.get(str(file))
        if not job:
            here = str(top.joinpath(scale if first in SCALES else first, *rest))
            matches = ((rule, pattern.match(here)) for rule, pattern in patterns.items())
            job = next((Job(rule, frozenset(match.groupdict().items())) for rule, match in matches if match), None)
        if job:
            found.append(Cost(job.rule, first if first in SCALES else "", job.wildcards, job.cells, float(row["s"])))
    return found


def read_costs(path: str | Path) -> list[Cost]:
    """Costs of a CSV file as `write_costs` writes it; none where there is no file.

    Raises:
        ValueError: a column is missing or is no number.
    """
    if not Path(path).is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        try:
            return [Cost(row["rule"], row["scale"], frozenset(tuple(word.split("=", 1)) for word in row["wildcards"].split()),
                         int(row["cells"]), float(row["seconds"]), row["hardware"]) for row in csv.DictReader(file)]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a table of costs: {error!r}") from None


def write_costs(path: str | Path, costs: Iterable[Cost]) -> None:
    """Write costs as CSV, sorted. Those of the file stay, unless they are of the same rule, scale and hardware."""
    costs = list(costs)
    new = {(cost.rule, cost.scale, cost.hardware) for cost in costs}
    costs += [cost for cost in read_costs(path) if (cost.rule, cost.scale, cost.hardware) not in new]
    rows = sorted([cost.rule, cost.scale, " ".join("=".join(pair) for pair in sorted(cost.wildcards)), str(cost.cells),
                   f"{cost.seconds:.2f}", f'"{cost.hardware}"'] for cost in costs)
    write_text(path, "\n".join(map(",".join, [["rule", "scale", "wildcards", "cells", "seconds", "hardware"], *rows])) + "\n")


def hardware(results: str | Path) -> str:
    """Processor and GPU of a run as its provenance.json says, else of this machine, which then names no GPU."""
    from cupel.reporting.provenance import processor

    made = Path(results) / "provenance.json"
    about = read_json(made) if made.is_file() else {"processor": processor()}
    return ", ".join(filter(None, [about["processor"], about.get("versions", {}).get("gpu")]))


def _keys(wildcards: frozenset) -> list[tuple[int, frozenset]]:
    """What a time is looked up by, from fine to coarse."""
    kept = [[pair for pair in wildcards if pair[0] not in left_out]
            for left_out in (["seed"], ["seed", "rate"], ["seed", "rate", "attack"])]
    kept += [[pair for pair in wildcards if pair[0] in ("dataset", "model")]]
    return list(enumerate(map(frozenset, kept)))


class Times:
    """Times of jobs by what was measured.

    Args:
        scale: that is planned.
        costs: `measured` and committed. For each rule those of one scale and machine are used: of this scale before others, of
            this results folder before others, of hardware `here` before other.
        here: see `hardware`.
        gpu: False: jobs that ask for a GPU have none, and take nobody knows how long.
    """

    def __init__(self, scale: str, costs: list[Cost], here: str, gpu: bool = True):
        def rank(cost: Cost) -> tuple:
            away = abs(SCALES.index(cost.scale or scale) - SCALES.index(scale))
            return away > 0, cost.hardware != "", cost.hardware != here, away, cost.scale or scale, cost.hardware

        self.scale, self.gpu, best = scale, gpu, {}
        self.used, self._seconds = defaultdict(list), defaultdict(list)  # costs by rule; seconds by rule and key
        for cost in costs:
            best[cost.rule] = min(best.get(cost.rule, rank(cost)), rank(cost))
        for cost in costs:
            if rank(cost) == best[cost.rule]:
                self.used[cost.rule].append(cost)
                for key in _keys(cost.wildcards) if cost.scale in ("", scale) else []:
                    self._seconds[cost.rule, *key].append(cost.seconds / cost.cells)

    def of(self, job: Job) -> float | None:
        """Seconds of a job; None: unknown."""
        if job.gpu and not self.gpu:
            return None
        found = (self._seconds.get((job.rule, *key)) for key in _keys(job.wildcards))
        each = next(filter(None, found), None)
        return each and job.cells * statistics.median(each)


def ends(jobs: list[Job], seconds: list[float]) -> list[float]:
    """When each job ends, on as many cores as it likes."""
    @functools.cache
    def end(place: int) -> float:
        return seconds[place] + max(map(end, jobs[place].after), default=0.0)

    return list(map(end, range(len(jobs))))


def _row(jobs: list[Job], times: Times) -> tuple[str, ...]:
    """Jobs of one rule, for people."""
    rule, todo = jobs[0].rule, [job for job in jobs if job.todo]
    used, cells = times.used.get(rule, []), sum(job.cells for job in todo)
    one = ""
    if used:
        each = sorted(cost.seconds / cost.cells for cost in used)
        one = duration(statistics.median(each)) + f" ({duration(each[0])} to {duration(each[-1])})" * (len(each) > 1)
        one += " a cell" * any(cost.cells > 1 for cost in used) + " *" * bool(used[0].hardware)
        one += f" at {used[0].scale}" * (used[0].scale not in ("", times.scale))
    known = [seconds for job in todo if (seconds := times.of(job)) is not None]
    total = [duration(sum(known))] * bool(known) + [f"{len(todo) - len(known):,} unknown"] * (len(known) < len(todo))
    return (rule, f"{len(todo):,}" + f" ({cells:,} cells)" * (cells > len(todo)), f"{len(jobs) - len(todo):,}",
            "yes" * any(job.gpu for job in jobs), one, f"{len(used):,}", ", ".join(total))


def show(jobs: list[Job], times: Times, cores: int) -> str:
    """The plan for people, rules in the order of the chain."""
    rules = defaultdict(list)
    for _, place in sorted(zip(ends(jobs, [1.0] * len(jobs)), range(len(jobs)), strict=True)):
        rules[jobs[place].rule].append(jobs[place])
    rows = [("rule", "to run", "done", "GPU", "one takes", "files", "all to run")]
    rows += [_row(mine, times) for mine in rules.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [" | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]

    todo = [job for job in jobs if job.todo]
    seconds = [(times.of(job) or 0.0) if job.todo else 0.0 for job in jobs]
    known = len(list(filter(None, seconds)))
    work = sum(each * job.threads for each, job in zip(seconds, jobs, strict=True))
    gpu = sum(each for each, job in zip(seconds, jobs, strict=True) if job.gpu)
    text += ["", f"{len(todo):,} jobs to run, {len(jobs) - len(todo):,} done. Of those to run {sum(job.gpu for job in todo):,} "
             f"ask for a GPU, where there is one. The time of {known:,} is known, of {len(todo) - known:,} unknown."]
    machines = {used[0].hardware for rule, used in times.used.items() if rule in rules} - {""}
    if known:
        least = duration(max(work / cores, *ends(jobs, seconds)))
        where = "A machine like the one below" if machines else "This machine"
        text += [f"{where}, {cores} cores: {'about' if known == len(todo) else 'at least'} {least}. "
                 f"{work / 3600:,.2f} core-hours, {gpu / 3600:,.2f} h of them in jobs that ask for a GPU."]
    if not times.gpu:
        text += [f"Scale {times.scale} is meant for GPUs, and none is seen here: hours of the jobs that ask for one are "
                 "not known. Run a cell or two where one is, and plan there."]
    if machines:
        text += [f"* from docs/results/costs.csv, measured on {'; '.join(sorted(machines))}; here it may be quite different."]
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m cupel.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", help="instead of that of config.yaml")
    parser.add_argument("--papers", nargs="+", help="instead of those of config.yaml")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="default: all of this machine")
    parser.add_argument("--write", metavar="FILE", help="add what was measured here to a table, as docs/results/costs.csv")
    options = parser.parse_args(arguments)
    chosen = {key: value for key in ("scale", "papers") if (value := getattr(options, key))}
    try:
        config = read_yaml("config.yaml") | chosen
        # in a moment, what the workflow would refuse after it was read
        check_schema(config, schema("config"), "command line" if chosen else "config.yaml")
        Grid(config["papers"], config["scale"], config.get("seeds"), config.get("plugins", []))
    except ConfigError as error:
        sys.exit(str(error))
    from snakemake.exceptions import WorkflowError

    scale, results = config["scale"], config.get("results", "results")
    try:
        jobs, patterns = graph(chosen, options.cores)
    except WorkflowError as error:
        sys.exit(str(error))
    costs, here = measured(results, scale, jobs, patterns), hardware(f"{results}/{scale}")
    if options.write:
        write_costs(options.write, [Cost(**{**vars(cost), "hardware": here}) for cost in costs])
    print(f"Scale {scale}, papers {', '.join(config['papers'])}\n")
    gpu = scale not in GPU_SCALES or Path("/dev/nvidiactl").exists()
    print(show(jobs, Times(scale, [*costs, *read_costs(COSTS)], here, gpu), options.cores))


if __name__ == "__main__":
    main()
