"""How much of a run goes into starting its jobs: seconds of imports and of work, by rule, measured inside the jobs.

    python benchmarks/startup.py [--scale demo] [--target all] [--cores 2] [--records jobs.csv]

It makes everything anew in a temporary results folder (`--results` keeps it) with a hook that every Python process
loads: it times the outermost imports and, at the end of a job, writes what they took. CPU seconds are the result where
other programs run beside; wall seconds where none do. The data sets must be prepared before (`snakemake data`).
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

#: becomes sitecustomize.py, which Python imports before anything else
HOOK = '''
import atexit, builtins, importlib, json, os, sys, time

_spent, _depth = [0.0, 0.0], 0


def _timed(function):
    def wrapper(*arguments, **named):
        global _depth
        if _depth:
            return function(*arguments, **named)
        _depth += 1
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            _depth -= 1
            _spent[0] += time.perf_counter() - wall
            _spent[1] += time.process_time() - cpu

    return wrapper


def _write():
    job = getattr(sys.modules.get("__main__"), "snakemake", None)
    if job is None or not hasattr(job, "rule"):
        return
    with open("/proc/self/stat") as file:
        begun = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    used = os.times()
    record = {"rule": job.rule, "output": str(job.output[0]), "seconds": time.clock_gettime(time.CLOCK_BOOTTIME) - begun,
              "cpu_seconds": used.user + used.system + used.children_user + used.children_system,
              "import_seconds": _spent[0], "import_cpu_seconds": _spent[1]}
    with open(os.path.join(os.environ["CUPEL_STARTUP"], f"{os.getpid()}-{time.time_ns()}.json"), "w") as file:
        json.dump(record, file)


builtins.__import__ = _timed(builtins.__import__)
importlib.import_module = _timed(importlib.import_module)
atexit.register(_write)
'''


def measure(arguments: list[str], results: Path, cores: int, config: list[str]) -> tuple[list[dict], float]:
    """Run Snakemake with the hook; records of its jobs, and wall seconds of the whole.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(HOOK)
        path = os.pathsep.join([folder, str(REPOSITORY / "workflow"), *filter(None, [os.environ.get("PYTHONPATH")])])
        records = Path(folder) / "records"
        records.mkdir()
        environment = {**os.environ, "PYTHONPATH": path, "CUPEL_STARTUP": str(records)}
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "snakemake", "--cores", str(cores), "--config", *config, f"results={results}",
                        "--quiet", "all", "--", *arguments], cwd=REPOSITORY, env=environment, check=True)
        seconds = time.perf_counter() - begun
        return [json.loads(file.read_text()) for file in sorted(records.glob("*.json"))], seconds


def table(records: list[dict]) -> list[dict]:
    """Sums by rule, and of all; shares are of imports in the job's seconds."""
    rows = []
    for rule in [*dict.fromkeys(record["rule"] for record in records), "all"]:
        mine = [record for record in records if rule in (record["rule"], "all")]
        total = {key: sum(record[key] for record in mine)
                 for key in ("seconds", "import_seconds", "cpu_seconds", "import_cpu_seconds")}
        rows.append({"rule": rule, "jobs": len(mine), **total, "share": total["import_seconds"] / total["seconds"],
                     "cpu_share": total["import_cpu_seconds"] / total["cpu_seconds"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="demo")
    parser.add_argument("--target", nargs="+", default=["all"])
    parser.add_argument("--config", nargs="*", default=[], help="more settings, as for snakemake --config")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", help="where results go, to be kept; default: a temporary folder")
    parser.add_argument("--records", help="a CSV file for the record of every job")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(options.results or temporary).resolve()
        records, seconds = measure(options.target, results, options.cores, [f"scale={options.scale}", *options.config])
    if options.records:
        with open(options.records, "w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({**record, "output": os.path.relpath(record["output"], results)} for record in records)
    print(f"{len(records)} jobs, {seconds:.0f} s with {options.cores} cores")
    print(f"{'rule':20} {'jobs':>5} {'s':>8} {'imports':>8} {'share':>6} {'CPU s':>8} {'imports':>8} {'share':>6}")
    for row in sorted(table(records), key=lambda row: row["seconds"]):
        print(f"{row['rule']:20} {row['jobs']:5} {row['seconds']:8.1f} {row['import_seconds']:8.1f} {row['share']:6.1%} "
              f"{row['cpu_seconds']:8.1f} {row['import_cpu_seconds']:8.1f} {row['cpu_share']:6.1%}")


if __name__ == "__main__":
    main()
