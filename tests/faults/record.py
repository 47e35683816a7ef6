"""What was tried and what happened: one row for each trial, and the table of them."""

import contextlib
import csv
import functools
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tests.conftest import REPOSITORY

GROUPS = {
    "kill": "kill -9 of the process group",
    "download": "downloads",
    "disk": "unwritable folders and full disks",
    "lock": "two runs in one folder",
    "checkpoint": "poisoned checkpoints",
    "archive": "archives",
    "setting": "wrong configurations",
    "sandbox": "hostile programs",
}


@dataclass
class Trial:
    """One trial.

    Attributes:
        group: of `GROUPS`.
        fault: what was done.
        variant: the moment, or which of several ways.
        happened: what the program did; fixed words, so that equal ends can be counted.
        lost: work that was lost beyond what had to be.
        message: beginning of the error shown, if any.
        ok: all that must hold did.
        made: commit and machine.
    """

    group: str
    fault: str
    variant: str = ""
    happened: str = ""
    lost: str = "none"
    message: str = ""
    ok: bool = False
    made: str = ""


TRIALS: list[Trial] = []


@functools.cache
def here() -> str:
    """Commit and machine of this session."""
    from cupel.reporting.provenance import git_commit, processor

    commit, changes, _ = git_commit(REPOSITORY).partition("+")
    return f"commit {commit[:7]}{changes and '+changes'}, {processor()}"


@contextlib.contextmanager
def trial(group: str, fault: str, variant: str = "") -> Iterator[Trial]:
    """Record one trial: it holds if the block ends without an error."""
    row = Trial(group, fault, variant, made=here())
    TRIALS.append(row)
    try:
        yield row
        row.ok = True
    except BaseException as error:
        row.happened = row.happened or "not as it must be"
        row.lost = row.lost if row.lost != "none" else "see message"
        row.message = shorten(f"{type(error).__name__}: {error}")
        raise


def shorten(text: str, length: int = 110) -> str:
    """The beginning of a message, in one line and without the temporary folders and numbers of this very run."""
    text = re.sub(r"/[^\s'\"]*/pytest-\d+/[^\s/'\"]+/", "", " ".join(text.split()))
    text = re.sub(r"127\.0\.0\.1:\d+", "SITE", re.sub(r"\b[0-9a-f]{16,}\b", "…", text))
    return text if len(text) <= length else text[: length - 1] + "…"


def with_earlier(path: Path) -> list[Trial]:
    """Trials of this session, and of those on record at `path` the faults that it left out; a whole suite stands alone."""
    if set(GROUPS) <= {row.group for row in TRIALS} or not path.is_file():
        return TRIALS
    tried = {(row.group, row.fault) for row in TRIALS}
    with open(path, newline="", encoding="utf-8") as file:
        earlier = [Trial(**{**row, "ok": row["ok"] == "True"}) for row in csv.DictReader(file)]
    return [*(row for row in earlier if (row.group, row.fault) not in tried), *TRIALS]


def write_csv(path: Path, trials: list[Trial]) -> None:
    """One row for each trial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Trial)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in trials)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def markdown(trials: list[Trial]) -> str:
    """The counts by group, then by fault with what happened and the first message seen."""
    from cupel.reporting.provenance import versions

    used = {name: value for name, value in versions().items()
            if name in ("cupel", "python", "torch", "numpy", "snakemake", "safetensors", "system")}
    bad = [row for row in trials if not row.ok]
    parts = Counter(row.made for row in trials)
    command = "make faults" + "".join(f" {name}={os.environ[name]}" for name in ("CUPEL_KILLS",) if name in os.environ)
    lines = [
        "# Faults tried on purpose, and what happened", "",
        f"Made by `{command}` (tests/faults; every trial is a row of results/faults/faults.csv) at "
        + "; ".join(made + (f" ({count} trials)" if len(parts) > 1 else "") for made, count in parts.items())
        + ". Versions: " + ", ".join(f"{name} {value}" for name, value in used.items()) + ".", "",
        f"{len(trials)} trials, {len(trials) - len(bad)} as they must be"
        + (f", **{len(bad)} not**." if bad else ", none with work lost beyond what was under way."), "",
        "| group | trials | as it must be | work lost |", "|---|---|---|---|"]
    for group, title in GROUPS.items():
        rows = [row for row in trials if row.group == group]
        lost = "; ".join(f"{text}: {count}" for text, count in Counter(row.lost for row in rows).items())
        lines.append(f"| {title} | {len(rows)} | {sum(row.ok for row in rows)} | {_cell(lost)} |")
    for group, title in GROUPS.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}", "",
                  "| fault | trials | as it must be | what happened | message begins |", "|---|---|---|---|---|"]
        for fault in dict.fromkeys(row.fault for row in trials if row.group == group):
            rows = [row for row in trials if (row.group, row.fault) == (group, fault)]
            ends = Counter(row.happened for row in rows)
            happened = "; ".join(end + (f" ({count})" if len(ends) > 1 else "") for end, count in ends.most_common())
            message = next((row.message for row in rows if row.message), "")
            lines.append(f"| {_cell(fault)} | {len(rows)} | {sum(row.ok for row in rows)} | {_cell(happened)} "
                         f"| {_cell(message)} |")
    return "\n".join(lines) + "\n"
