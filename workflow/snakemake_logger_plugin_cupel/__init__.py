"""How a run looks on a terminal: one line when a job starts, with what it is and what is left. `--logger cupel`.

Found by Snakemake by its name, see `snakemake_interface_logger_plugins`; profiles/default switches it on. The Snakefile hands
over what only it knows in records with an attribute `cupel` (workflow/rules/terminal.smk). Snakemake's own full log is
written beside, to .snakemake/log.
"""

import logging
import re
import shutil
import statistics
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from snakemake.cli import get_argument_parser
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from cupel.reporting.terminal import counted, duration, job_words, reason, shortened

#: no line of output is longer
LONGEST = 300
#: lines for jobs of one run; of more jobs every second, third... has one
JOB_LINES = 200
#: seconds between two lines on a job that goes on and on, where lines cannot be written over
PATIENCE = 300
#: what Snakemake says of itself and nobody needs; all of it stands in its log
NOISE = re.compile("Building DAG|Using shell|Provided |Rules claiming|Select jobs|Execute [0-9]+ jobs|Assuming unrestricted|"
                   "Singularity containers|Activating|Elapsed time|None$|$")
#: what it says of a job that failed, beside the reason
ECHO = re.compile(r"RuleException:\nCalledProcessError|Exiting because a job execution|At least one job did not complete")


@dataclass
class Run:
    """What is known of the jobs of a run."""

    total: int = 0
    cores: int = 1
    defences: dict[str, str] = field(default_factory=dict)
    #: by number, what will run: rule, wildcards, cells, seconds (None: unknown), threads
    jobs: dict[int, tuple] = field(default_factory=dict)
    #: by number: when it began (monotonic), its words, its log
    active: dict[int, tuple[float, str, str]] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    #: rule to seconds for each cell, of this run
    took: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def end(self, number: int) -> None:
        """A job has ended well."""
        begun, _, _ = self.active.pop(number, (None, "", ""))
        if not self.jobs or number in self.jobs:
            self.done.add(number)
        self.failed.pop(number, None)
        if begun is not None and number in self.jobs:
            rule, _, cells, *_ = self.jobs[number]
            self.took[rule].append((time.monotonic() - begun) / cells)

    def seconds(self, number: int) -> float | None:
        """How long a job takes: as those of its rule took in this run, else as was measured before; None: unknown."""
        rule, _, cells, known, _ = self.jobs.get(number, ("", {}, 1, None, 1))
        here = self.took.get(rule)
        return known if known is not None else statistics.median(here) * cells if here else None

    def left(self) -> str:
        """Time until the end, in words; nothing where too little is known."""
        times, now = {number: self.seconds(number) for number in self.jobs if number not in self.done}, time.monotonic()
        known = {number: max(seconds - (now - self.active[number][0] if number in self.active else 0), 0.0)
                 for number, seconds in times.items() if seconds is not None}
        work = sum(seconds * self.jobs[number][4] for number, seconds in known.items())
        least = max(work / self.cores, *known.values(), 0.0) if known else 0.0
        if not known or len(known) < len(times) / 2:
            return ""
        return f"{'about' if len(known) > 0.9 * len(times) else 'at least'} {duration(least)} left"


class LogHandler(LogHandlerBase):
    """See the module."""

    def __post_init__(self) -> None:
        refuse_misplaced_targets()
        self.stream = sys.stdout if self.common_settings.stdout else sys.stderr
        self.terminal = self.stream.isatty()
        self.run, self.said, self.status, self.begun = Run(), set(), "", time.monotonic()
        self.tell, self.closed = None, threading.Event()
        # how far running jobs are: in place once a second, else now and then
        threading.Thread(target=self._watch, daemon=True).start()

    writes_to_stream, writes_to_file, has_filter, has_formatter, needs_rulegraph = True, False, False, False, False

    def emit(self, record: logging.LogRecord) -> None:
        """Write what a record means for people."""
        try:
            if (facts := getattr(record, "cupel", None)) is not None:
                self._learn(facts)
            else:
                self._on(getattr(record, "event", None), record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """End the line that is written over."""
        self.closed.set()
        self._clear()
        super().close()

    def _learn(self, facts: dict) -> None:
        self.tell = facts.get("tell", self.tell)
        for key in ("defences", "jobs", "cores"):
            setattr(self.run, key, facts.get(key, getattr(self.run, key)))
        if "jobs" in facts:
            self.run.total, left = len(self.run.jobs), self.run.left()
            text = f"{facts.get('what', '')}: {counted(self.run.total, 'job')}"
            self._write(text + f", {left.removesuffix(' left')}" * bool(left))

    def _on(self, event: LogEvent | None, record: logging.LogRecord) -> None:
        if event == LogEvent.RUN_INFO:
            self.run.total = len(self.run.jobs) or record.stats["total"]
            if self.common_settings.dryrun:
                self._write(record.getMessage())
        elif event == LogEvent.JOB_INFO:
            self._start(record)
        elif event == LogEvent.JOB_FINISHED:
            self.run.end(record.job_id)
        elif event == LogEvent.JOB_ERROR:
            self._fail(record)
        elif event == LogEvent.SHELLCMD and record.shellcmd:
            self._write(record.shellcmd)
        elif event in (None, LogEvent.ERROR, LogEvent.DEBUG_DAG, LogEvent.GROUP_INFO, LogEvent.GROUP_ERROR):
            self._plain(record)

    def _start(self, record: logging.LogRecord) -> None:
        rule, wildcards, cells, *_ = self.run.jobs.get(record.jobid, (record.rule_name, dict(record.wildcards), 1))
        words = job_words(rule, wildcards, cells, self.run.defences)
        if self.common_settings.dryrun:
            why = "; ".join(part.partition(":")[0] for part in record.reason.split("; "))
            self._write(shortened(f"rule {record.rule_name}: {words} · {why}", 160))
            return
        run, log = self.run, (record.log or [""])[0]
        if run.jobs and record.jobid not in run.jobs:  # names for several results, which do nothing
            return
        run.active[record.jobid] = (time.monotonic(), words, log)
        number, seconds = len(run.done) + len(run.active), run.seconds(record.jobid)
        if run.total > JOB_LINES and number * JOB_LINES // run.total == (number - 1) * JOB_LINES // run.total:
            return
        parts = [words, f"about {duration(seconds)}" if seconds and seconds >= 1 else "",
                 f"{number:,} of {max(run.total, number):,} jobs", run.left()]
        self._write(" · ".join(filter(None, parts)))

    def _fail(self, record: logging.LogRecord) -> None:
        _, words, _ = self.run.active.pop(record.jobid, (0.0, record.rule_name, ""))
        logs = [Path(path) for path in record.log if Path(path).is_file()]
        text = reason(logs[0].read_text(encoding="utf-8", errors="replace")) if logs else ""
        text = text or str(record.rule_msg or "no reason was given")
        where = f" ({logs[0]})" if logs else ""
        self._write(f"FAILED  {words}{where}", *(f"    {line}" for line in text.splitlines()[:15]))
        self.run.failed[record.jobid] = f"{words}: {text.splitlines()[0]}"

    def _plain(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if getattr(record, "exception", "") == "WorkflowError":  # where in our files it was raised helps nobody
            text = re.sub(r'^WorkflowError.*:\n|\n  File ".*", line \d+, in .*', "", text)
        if text.startswith("Nothing to be done") and not self.common_settings.dryrun and self.tell:
            text = "\n".join(filter(None, [text, self.tell()]))
        elif text.startswith("Complete log"):
            failed = sorted(self.run.failed.values())
            first = [f"{counted(len(failed), 'job')} failed:", *(f"  {each}" for each in failed[:10])] if failed else []
            text = "\n".join([*first, f"Took {duration(time.monotonic() - self.begun)}. Full log: {text.partition(': ')[2]}"])
        elif record.levelno < logging.WARNING and NOISE.match(text):
            return
        if record.levelno >= logging.WARNING:
            if text in self.said or (self.run.failed and ECHO.match(text)):
                return
            self.said.add(text)
        self._write(text)

    def _write(self, *texts: str) -> None:
        self._clear()
        for line in "\n".join(texts).splitlines():
            print(line if len(line) <= LONGEST else line[:LONGEST - 1] + "…", file=self.stream)
        self.stream.flush()

    def _clear(self) -> None:
        if self.status:
            print("\r\x1b[2K", end="", file=self.stream, flush=True)
            self.status = ""

    def _watch(self) -> None:
        """Say how far the running jobs are, until all is done."""
        said: dict[int, float] = {}
        while not self.closed.wait(1.0):
            now = time.monotonic()
            with self.lock:
                if not self.terminal:
                    for number, (begun, words, log) in self.run.active.items():
                        if now - max(said.get(number, begun), begun) >= PATIENCE:
                            said[number] = now
                            self._write(f"    still {words} · {duration(now - begun)} so far{self._progress(log)}")
                elif self.run.active:
                    parts = [f"{len(self.run.done)} of {self.run.total} jobs done", self.run.left(),
                             *(self._running(*job, now) for job in self.run.active.items())]
                    self._clear()
                    self.status = shortened(" · ".join(filter(None, parts)), shutil.get_terminal_size().columns - 1)
                    print(f"\x1b[2m{self.status}\x1b[0m", end="", file=self.stream, flush=True)

    def _running(self, number: int, job: tuple[float, str, str], now: float) -> str:
        begun, words, log = job
        seconds = self.run.seconds(number)
        rest = (seconds or 0) - (now - begun)
        return f"{words}: {f'{duration(rest)} left of this job' if rest > 0 else duration(now - begun)}{self._progress(log)}"

    @staticmethod
    def _progress(log: str) -> str:
        """How far a job is by its own log, as in `train: 3,000/90,000 images`."""
        try:
            with open(log, "rb") as file:
                file.seek(max(file.seek(0, 2) - 2000, 0))
                found = re.findall(r"^(.*?: [\d,]+/[\d,]+ \w+),", file.read().decode(errors="replace"), re.MULTILINE)
        except OSError:
            return ""
        return f" ({found[-1]})" if found else ""


def refuse_misplaced_targets() -> None:
    """End with a sentence where a target stands among settings: Snakemake answers `--config scale=bench fst` by a traceback.

    Raises:
        SystemExit: so it is.
    """
    if {"--config", "-C"} & set(sys.argv):
        arguments = sys.argv[1:sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
        words = get_argument_parser().parse_known_args(arguments)[0].config or []
        wrong = [word for word in words if "=" not in word]
        if wrong:
            settings = " ".join(word for word in words if "=" in word)
            sys.exit(f"--config takes name=value, and {' '.join(wrong)!r} is none. What is to be made stands after two dashes: "
                     f"--config {settings} -- {' '.join(wrong)}")
