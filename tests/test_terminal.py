"""What a run says: a job in words, lines of the logger for Snakemake's events, findings, and answers to wrong wishes."""

import io
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import snakemake_logger_plugin_cupel as terminal
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

from cupel.evaluation.claims import COLUMNS
from cupel.reporting.terminal import duration, findings, job_words, reason, summary
from tests.conftest import REPOSITORY

BADNETS = {"dataset": "cifar10", "model": "resnet18", "recipe": "fst", "attack": "badnets", "rate": "0.05", "seed": "0"}


def test_a_job_in_words():
    assert job_words("train_victim", BADNETS) == "victim  BadNets 5 %, ResNet-18, CIFAR-10"
    assert job_words("purify", {**BADNETS, "defence": "fst~x", "seed": "2"}, defences={"fst~x": "FST, odd"}).startswith(
        "defence  FST, odd, BadNets 5 %") and "seed 2" in job_words("poison", {**BADNETS, "seed": "2"})
    assert job_words("purify", BADNETS, 7).startswith("7 defences  BadNets")
    assert job_words("train_victim", {**BADNETS, "attack": "clean", "rate": "0"}) == "victim  clean, ResNet-18, CIFAR-10"
    assert job_words("some_rule", {}) == "some rule"
    assert [duration(seconds) for seconds in (0.94, 42, 260, 7300)] == ["0.9 s", "42 s", "4 min", "2.0 h"]


def test_the_reason_of_a_failure_is_its_error_without_frames():
    log = ('Epoch 1\nTraceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\n'
           "ValueError: no such file\nput it there\n")
    assert reason(log) == "ValueError: no such file\nput it there" and reason("one\nKilled\n") == "Killed" and reason("") == ""


@pytest.fixture
def handler(monkeypatch):
    """A logger that writes into a text, of a run of two jobs: a minute, and unknown."""
    monkeypatch.setattr(sys, "argv", ["snakemake"])
    settings = SimpleNamespace(stdout=False, dryrun=False, quiet=None, debug_dag=False, verbose=False, printshellcmds=False)
    made = LoggerPluginRegistry().get_plugin("cupel").log_handler(settings, None)
    made.stream = io.StringIO()
    jobs = {1: ("train_victim", BADNETS, 1, 60.0, 1), 2: ("train_victim", {**BADNETS, "attack": "sig"}, 1, 30.0, 1)}
    send(made, LogEvent.RUN_INFO, stats={"total": 3})
    send(made, cupel={"jobs": jobs, "cores": 1, "what": "Scale demo, papers fst"})
    yield made
    made.close()


def send(handler, event=None, message=None, level=logging.INFO, **extra):
    record = logging.LogRecord("snakemake", level, "", 0, message, None, None)
    record.__dict__.update(event=event, **extra)
    handler.emit(record)


def job(number, **extra):
    return {"jobid": number, "rule_name": "train_victim", "wildcards": BADNETS, "log": [], "reason": "", "rule_msg": None,
            **extra}


def test_lines_of_a_run(handler, tmp_path):
    send(handler, LogEvent.JOB_INFO, **job(1))
    send(handler, LogEvent.JOB_FINISHED, job_id=1)
    send(handler, message="Select jobs to execute...")
    for _ in range(2):
        send(handler, message="a warning", level=logging.WARNING)
    log = tmp_path / "job.log"
    log.write_text("Traceback (most recent call last):\n  File 'x'\nValueError: " + "y" * 500)
    send(handler, LogEvent.JOB_INFO, **job(2))
    send(handler, LogEvent.JOB_ERROR, jobid=2, rule_name="train_victim", rule_msg=None, log=[str(log)])  # no wildcards
    send(handler, message="Complete log(s): /x/y.log")
    text = handler.stream.getvalue()
    assert text.splitlines()[:2] == ["Scale demo, papers fst: 2 jobs, about 90 s",
                                     "victim  BadNets 5 %, ResNet-18, CIFAR-10 · about 60 s · 1 of 2 jobs · about 90 s left"]
    assert "victim  SIG 5 %, ResNet-18, CIFAR-10 · about 30 s · 2 of 2 jobs · about 30 s left" in text
    assert text.count("a warning") == 1 and "Select jobs" not in text and "Traceback" not in text
    assert re.search(r"1 job failed:\n  victim  SIG 5 %.*ValueError: y+…?\nTook .*Full log: /x/y.log", text)
    assert max(map(len, text.splitlines())) <= terminal.LONGEST


def test_a_job_may_fail_without_a_log_here(handler):
    send(handler, LogEvent.JOB_INFO, **job(1))
    send(handler, LogEvent.JOB_ERROR, jobid=1, rule_name="train_victim", rule_msg=None, log=["s3://bucket/job.log"])
    assert handler.stream.getvalue().endswith("FAILED  victim  BadNets 5 %, ResNet-18, CIFAR-10\n    no reason was given\n")


def test_a_large_run_has_few_lines(handler):
    send(handler, cupel={"jobs": {}})
    send(handler, LogEvent.RUN_INFO, stats={"total": 5000})
    for number in range(3, 3000):
        send(handler, LogEvent.JOB_INFO, **job(number))
        send(handler, LogEvent.JOB_FINISHED, job_id=number)
    assert 100 < len(handler.stream.getvalue().splitlines()) < terminal.JOB_LINES


def test_nothing_to_do_still_tells_the_findings(handler):
    send(handler, cupel={"tell": lambda: "found this"})
    send(handler, message="Nothing to be done (all requested files are present and up to date).")
    assert handler.stream.getvalue().endswith("up to date).\nfound this\n")


def claim(name, verdict, direction="", effect=0.5, **changes):
    row = {"paper": "fst", "claim": name, "statement": f"{name} holds", "verdict": verdict, "direction": direction,
           "effect": effect, "low": None if effect is None else effect - 0.1, "high": None if effect is None else effect + 0.1,
           "unit": "difference in asr (fraction)", "settings": 2, "seeds": 1, **changes}
    return {column: row.get(column, "") for column in COLUMNS}


def test_findings_are_five_lines_a_paper(tmp_path):
    rows = [claim("a", "open", "for"), claim("b", "not judged", effect=None), claim("c", "indicated", "for"),
            claim("d", "refuted", "against"), claim("e", "supported", "for", 0.02, unit="difference in tau (number)"),
            claim("f", "indicated", "against")]
    lines = findings("fst", "A paper", pd.DataFrame(rows), 150)
    assert len(lines) == 5 and all(len(line) <= 150 for line in lines)
    assert lines[0].startswith("fst: A paper. 6 claims: 1 open, 1 not judged, 1 indicated for, 1 refuted, 1 supported, 1 indic")
    assert lines[1] == "  indicated for +50.0 points (+40.0 … +60.0), 2 settings x 1 seed: c holds"
    alone = findings("x", "T", pd.DataFrame([claim("e", "open", unit="difference in tau (number)", low=None, high=None)]), 150)
    assert alone[1] == "  open +0.5 (no interval), 2 settings x 1 seed: e holds"
    assert lines[3] == "  supported +0.02 (-0.08 … +0.12), 2 settings x 1 seed: e holds"
    pd.DataFrame(rows[1:2]).to_csv(tmp_path / "none.csv", index=False)
    assert summary([("ims", "Another", tmp_path / "none.csv")]) == "ims: Another. 1 claim: 1 not judged"
    pd.DataFrame(rows).to_csv(tmp_path / "claims.csv", index=False)
    cells = pd.DataFrame({"path": ["x", "x", "y"], "status": ["failed", "failed", "ok"], "reason": ["Diverged: at 3"] * 3,
                          "paper": "fst", "stage": "victim", "valid": [True, True, False]})
    cells.to_parquet(tmp_path / "cells.parquet")
    asked = [{"paper": "fst", "folder": folder} for folder in "xyz"]
    found = [summary([("fst", "A paper", tmp_path / "claims.csv")], tmp_path / "cells.parquet", asked[:k]) for k in (1, 2, 3)]
    assert found[1].endswith("1 cell failed, shown in the report:\n  x: Diverged: at 3\n1 victim beyond the gate: "
                             "no valid victim, so no merit of a defence:\n  y")
    assert "1 are in it and not asked for, first y (paper fst)" in found[0]
    assert "1 are asked for and not in it, first z (paper fst)" in found[2]


@pytest.mark.parametrize(("words", "sentence"), [
    (["crw"], "unknown target 'crw' .did you mean 'crow'.*known are "),
    (["--config", "scale=bench", "fst"], "'fst' is none. .* stands after two dashes: --config scale=bench -- fst"),
    (["--config", "scale=paper", "--", "ims_inner_step"], "ims_inner_step has no scale 'paper'; it has smoke, "),
    (["--config", "scale=smoke", "--", "ims_inner_step"], "rule ims_inner_step:")])
def test_papers_are_asked_for_by_name(words, sentence):
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    text = run.stdout + run.stderr
    assert re.search(sentence, text) and "Traceback" not in text, text[-2000:]
    assert (run.returncode == 0) == sentence.startswith("rule ")
    if run.returncode == 0:
        assert "defence  FST" not in text and "train_text_victim" not in text  # it alone
