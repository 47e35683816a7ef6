"""The sandbox: honest programs run, hostile ones do no harm, wrong ones do not pass, and nothing is left behind."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from cupel.text import sandbox
from cupel.text import sandbox_supervisor as supervisor
from cupel.text.sandbox import LAYERS, Capabilities, Limits, SandboxError, capabilities, check_untrusted, run_untrusted
from tests.hostile import FORGERIES, HOSTILE, ONLY_SECCOMP, Bait, attack, survivors

pytestmark = pytest.mark.skipif(not capabilities().sufficient, reason=f"untrusted code cannot be isolated: {capabilities()}")

FALLBACK = ("landlock", "seccomp")
QUICK = ["fork bomb", "another program", "kill the parent", "kill everything", "signal by way of a pipe", "starve the parent",
         "tcp", "unix sockets", "write outside", "change outside", "read a secret", "installed packages", "os._exit(0)"]


def needs(layers):
    """Skip where a layer does not work."""
    if lacking := set(layers) - set(capabilities().layers):
        pytest.skip(f"this machine has no {', '.join(sorted(lacking))}: {capabilities()}")


def marked(quick):
    """The hostile programs, those that are not quick marked slow."""
    return [pytest.param(name, marks=[] if quick(name) else [pytest.mark.slow]) for name in HOSTILE]


# ---- hostile programs

@pytest.mark.parametrize("name", marked(lambda name: name not in ("stopped", "deep recursion", "deep recursion in C")))
def test_hostile(name):
    assert attack(name)[1] == []


@pytest.mark.parametrize("name", marked(QUICK.__contains__))
def test_hostile_without_namespaces(name):
    needs(FALLBACK)
    assert attack(name, FALLBACK)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ONLY_SECCOMP])
def test_hostile_with_namespaces_alone(name):
    needs(["namespaces"])
    assert attack(name, ("namespaces",))[1] == []


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery(name):
    assert attack(name)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("layers", [FALLBACK, ("namespaces",)], ids="+".join)
@pytest.mark.parametrize("name", FORGERIES)
def test_forgery_with_fewer_layers(name, layers):
    needs(layers)
    assert attack(name, layers)[1] == []


@pytest.mark.parametrize("name", ["tcp", "udp", "unix sockets", "write outside", "change outside", "read a secret",
                                  "read the environment", "links", "fork bomb"])
def test_bait_is_within_reach(name, tmp_path):
    """Without the sandbox the same programs do harm: that they do none within is due to it."""
    with Bait() as bait:
        source = bait.fill(HOSTILE[name][0])
        if name == "fork bomb":
            source = "import os\nfor _ in range(3):\n    if os.fork() == 0: os._exit(0)\nprint('REACHED 3 children')"
        elif name == "write outside":  # not into the library of this Python
            source = source.replace('os.__file__, "/etc/ld.so.cache"', "")
        done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert bait.harm(sandbox.Outcome("failed", "", 0.0, done.stdout, ()))


# ---- processes, where they are allowed

DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("daemon", flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(0.3)
"""


def test_daemon_ends_with_the_program():
    needs(["namespaces"])
    outcome = run_untrusted(DAEMON, Limits(processes=4, seconds=10))
    assert outcome.status == "passed" and outcome.output == "daemon\n"
    assert survivors() == []


def test_fork_bomb_is_bounded_and_ends():
    needs(["namespaces"])
    if os.geteuid() == 0 and "0 4294967295" not in " ".join(Path("/proc/self/uid_map").read_text().split()):
        pytest.skip("the root of a container may have no other user to become, and the kernel counts no processes of root")
    source = HOSTILE["fork bomb"][0].replace("REACHED", "made").replace("break", "print(made, flush=True); time.sleep(60)")
    outcome = run_untrusted("import time\n" + source, Limits(processes=10, cpu=1, seconds=2, memory=1 << 28))
    assert outcome.status == "timeout"
    assert 1 <= int(outcome.output.split()[0]) <= 10
    assert survivors() == []


def test_threads_may_be_allowed():
    needs(["namespaces"])
    source = "import threading\nt = threading.Thread(target=print, args=('thread',))\nt.start()\nt.join()"
    assert run_untrusted(source, Limits(processes=2)).output == "thread\n"
    assert run_untrusted(source).status == "failed"


@pytest.mark.parametrize("layers", [None, FALLBACK], ids=["all", "landlock+seccomp"])
def test_dies_with_its_caller(layers, tmp_path):
    layers = layers or capabilities().layers  # named: the caller is not to run probes first
    needs(layers)
    code = ("from cupel.text.sandbox import *\n"
            f"run_untrusted('import time; print(1); time.sleep(600)', Limits(seconds=600), {layers!r})")
    # a caller that is killed cannot remove its temporary folder
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment)

    def below():
        mark = f'"parent": {caller.pid},'.encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.append(path)
        return found

    def wait(until):
        deadline = time.monotonic() + 30
        while not until() and time.monotonic() < deadline:
            time.sleep(0.05)
        return until()

    try:
        assert wait(lambda: len(below()) >= 3)  # supervisor, keeper, program
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        assert wait(lambda: not below())
    finally:
        caller.kill()
        caller.wait()


def test_nothing_is_left():
    descriptors = len(os.listdir("/proc/self/fd"))
    folders = set(Path("/tmp").glob("cupel-sandbox-*"))
    for source in ("print(1)", "import os; os._exit(3)", "while True: pass"):
        run_untrusted(source, Limits(cpu=1, seconds=2))
    assert survivors() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert set(Path("/tmp").glob("cupel-sandbox-*")) <= folders
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# ---- honest programs

HONEST = """
import collections, dataclasses, decimal, functools, hashlib, heapq, itertools, json, math, random, re, statistics, string
import sqlite3, typing, zlib
@dataclasses.dataclass
class Point:
    x: int
    y: typing.Optional[int] = None
assert typing.get_type_hints(Point)["x"] is int
assert math.isclose(statistics.mean([1, 2, 4]), 7 / 3)
assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")
assert zlib.decompress(zlib.compress(b"x" * 1000)) == b"x" * 1000
assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
assert __name__ == "__main__"
import os, sys
assert os.getcwd() == os.environ["HOME"] and os.listdir(".") == []
assert not hasattr(sys, "ps1") and "site" not in sys.modules
print("héllo", file=sys.stderr)
"""


@pytest.mark.parametrize("layers", [None, FALLBACK, ("namespaces",), ("seccomp",), ("landlock",), ()],
                         ids=lambda layers: "all" if layers is None else "+".join(layers) or "none")
def test_honest_program(layers):
    needs(layers or ())
    outcome = run_untrusted(HONEST, layers=layers)
    assert (outcome.status, outcome.detail, outcome.output) == ("passed", "", "héllo\n")
    assert set(outcome.layers) == set(capabilities().layers if layers is None else layers)
    assert 0 <= outcome.seconds < 30


def test_scratch_folder():
    needs(["namespaces"])
    source = """
import os, tempfile
with tempfile.TemporaryDirectory() as folder:
    with open(folder + "/x", "w") as file: file.write("x" * 1000)
    os.rename(folder + "/x", "y")
assert os.listdir(".") == ["y"] and os.path.getsize("y") == 1000
with open(os.devnull, "w") as null: null.write("x")
"""
    outcome = run_untrusted(source)
    assert outcome.status == "passed", outcome
    assert run_untrusted("import os; assert not os.listdir('.')").status == "passed"


def test_same_program_same_outcome():
    source = "import random; print(random.random(), hash('x'), list({'a', 'b', 'c', 'd'}))"
    assert run_untrusted(source).output == run_untrusted(source).output


def test_several_at_once():
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda k: run_untrusted(f"print({k})"), range(8)))
    assert [(outcome.status, outcome.output) for outcome in outcomes] == [("passed", f"{k}\n") for k in range(8)]


def test_errors_are_told():
    outcome = run_untrusted("def f():\n    raise KeyError('k')\nprint('before')\nf()")
    assert (outcome.status, outcome.detail) == ("failed", "KeyError: 'k'")
    assert outcome.output.startswith("before\n") or "before\n" in outcome.output
    assert 'File "<__main__>", line 2, in f' in outcome.output and "sandbox_supervisor" not in outcome.output
    assert run_untrusted("x = (").detail.startswith("SyntaxError")
    assert run_untrusted("import socket; socket.socket()").status == "blocked"
    assert run_untrusted("").status == "passed"


def test_output_keeps_its_end():
    outcome = run_untrusted("for k in range(10000): print(k)", Limits(output=100))
    assert outcome.output.endswith("9998\n9999\n") and len(outcome.output) == 100


# ---- tests of a function

def test_values_pass_by_value():
    values = [None, True, False, 0, -7, 10**5000, 0.1, float("inf"), -0.0, 1 + 2j, "é\ud800\0\n", b"\0\xff", [], [1, [2]], (),
              (1,), set(), {1, (2, 3)}, frozenset({1}), {}, {"a": {1: [None]}, (1, 2): 3.5}, Decimal("1.10"), Fraction(1, 3)]
    for value in values:
        back = supervisor._unpack(supervisor._pack(value))
        assert back == value and type(back) is type(value) and repr(back) == repr(value) if value != 10**5000 else back == value
    with pytest.raises(TypeError, match="type generator"):
        supervisor._pack(k for k in [1])
    for nonsense in ([], [1], ["int"], ["int", "x"], ["object", 1], ["list", 3], ["dict", [[1]]], "x", 7, ["complex", []],
                     ["set", [["list", []]]], ["Decimal", "x"], ["Fraction", "1/0"], ["bytes", "zz"], {"a": 1}):
        with pytest.raises(supervisor.SolutionError):
            supervisor._unpack(nonsense)


def test_check():
    test = "def check(candidate):\n    assert candidate([3, 1], reverse=True) == [3, 1]\n    assert helper() == 1"
    right, setup = "def f(x, reverse=False): return sorted(x, reverse=reverse)", "def helper(): return 1"
    assert check_untrusted(right, "f", test, setup).status == "passed"
    for source, status, detail in (
            ("def f(x, reverse): return sorted(x)", "failed", "AssertionError"),
            ("def f(x): return x", "failed", "TypeError"),
            ("def f(x, reverse): return x[5]", "failed", "IndexError: list index out of range"),
            ("def f(x, reverse): raise MemoryError", "memory", "MemoryError"),
            ("def f(x, reverse):\n    while True: pass", "timeout", "used up 1 s|not done after"),
            ("def f(x, reverse): open('/etc/x', 'w')", "blocked", "(OS|Permission)Error"),
            ("def f(x, reverse): return iter(x)", "failed", "TypeError: a value of type list_iterator"),
            ("f = 3", "failed", "NameError: no function f"),
            ("def g(): pass", "failed", "NameError: no function f"),
            ("def f(x: return", "failed", "SyntaxError"),
            ("import nowhere", "failed", "ModuleNotFoundError"),
            ("assert False", "failed", "AssertionError")):
        outcome = check_untrusted(source, "f", test, setup, Limits(cpu=1, seconds=10))
        assert outcome.status == status and re.match(detail, outcome.detail), outcome


def test_check_ignores_code_for_scripts():
    source = "def f(x): return x\nif __name__ == '__main__':\n    f(int(input()))\n"
    assert check_untrusted(source, "f", "def check(c): assert c(1) == 1").status == "passed"


def test_the_test_is_confined_too():
    with Bait() as bait:
        test = bait.fill("def check(c):\n    try: print(open('@FOLDER@/secret').read())\n    except OSError: pass\n"
                         "    try: open('@FOLDER@/new', 'w')\n    except OSError: pass\n")
        assert bait.harm(check_untrusted("def f(): pass", "f", test)) == []


# ---- what is there, and what is not

def test_refuses_without_the_least(monkeypatch):
    for layers in ((), ("seccomp",), ("namespaces", "landlock")):
        found = Capabilities(layers, {layer: "not here" for layer in LAYERS if layer not in layers})
        monkeypatch.setattr(sandbox, "capabilities", lambda found=found: found)
        with pytest.raises(SandboxError, match=r"cannot isolate untrusted code.*is missing: not here"):
            run_untrusted("print(1)")
    assert run_untrusted("print(1)", layers=()).status == "passed"  # named by the caller


def test_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    found = capabilities.__wrapped__()
    assert found.layers == () and "needs Linux" in found.missing["seccomp"]
    with pytest.raises(SandboxError, match="needs Linux"):
        run_untrusted("print(1)", layers=())


def test_wrong_settings():
    with pytest.raises(ValueError, match="landlock"):
        run_untrusted("", layers=("jail",))
    with pytest.raises(ValueError, match="namespaces"):
        run_untrusted("", Limits(processes=1), layers=FALLBACK)
    for name in ("cpu", "seconds", "memory", "disk", "files", "output"):
        with pytest.raises(ValueError, match=f"limits.{name} is 0"):
            run_untrusted("", Limits(**{name: 0}))


def test_supervisor_that_fails(monkeypatch, tmp_path):
    broken = tmp_path / "sandbox_supervisor.py"
    broken.write_text("raise SystemExit('no luck')")
    monkeypatch.setattr(sandbox, "_SUPERVISOR", broken)
    with pytest.raises(SandboxError, match="no luck"):
        run_untrusted("print(1)")


def test_a_failing_layer_is_an_error_not_a_result():
    """A program that could not be confined is not run."""
    code = ("import ctypes, sys\nctypes.CDLL(None).prctl(38, 1, 0, 0, 0)\n"
            "from cupel.text import sandbox_supervisor as s\n"
            # a filter that refuses landlock_create_ruleset and unshare, inherited by all that follows
            "unshare = s._numbers(s._KILLED, s._MACHINES[s.platform.machine()][0])['unshare']\n"
            "rows = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, 0x50000 | 38), (0x15, 0, 1, unshare),"
            " (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)]\n"
            "code = s._Code(len(rows), (s._Instruction * len(rows))(*rows))\n"
            "s._call('prctl', 22, 2, ctypes.byref(code), 0, 0)\n"
            "from cupel.text.sandbox import *\nprint(capabilities())\n"
            "for layers in (None, ('landlock',), ('namespaces',)):\n"
            "    try: run_untrusted('print(1)', layers=layers)\n"
            "    except SandboxError as error: print('refused:', error)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    lines = done.stdout.splitlines()
    assert lines[0].startswith("active: seccomp; namespaces is missing: unshare: Operation not permitted"), done
    assert "landlock is missing: the kernel has no Landlock" in lines[0]
    assert [line.startswith("refused:") for line in lines[1:]] == [True] * 3


def test_without_permission_to_make_namespaces():
    """As on machines that forbid user namespaces: the other layers serve, and hold."""
    needs(FALLBACK)
    if not (shutil.which("unshare") and shutil.which("setpriv")):
        pytest.skip("needs unshare and setpriv (util-linux)")
    code = ("from cupel.text.sandbox import *\nfrom tests.hostile import *\nprint(capabilities().layers)\n"
            "print([attack(name)[1] for name in ('tcp', 'write outside', 'read a secret', 'kill everything')])")
    inner = "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all --inh-caps=-all -- \"$@\""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(["unshare", "-Ur", "sh", "-c", inner, "sh", sys.executable, "-c", code], capture_output=True,
                          text=True, timeout=120, env=os.environ | {"PYTHONPATH": path})
    if done.returncode and "Operation not permitted" in done.stderr.splitlines()[0]:
        pytest.skip("user namespaces are forbidden here already")
    assert done.stdout.splitlines() == ["('landlock', 'seccomp')", "[[], [], [], []]"], done


# ---- the filter of system calls, also for the machine this is not

def judge(code, architecture, number, *arguments):
    """What a BPF program says to a system call: an interpreter for the instructions it may use."""
    data = [number, architecture, 0, 0]
    for argument in (*arguments, *[0] * (6 - len(arguments))):
        data += [argument & 0xFFFFFFFF, argument >> 32]
    k = value = 0
    while True:
        operation, true, false, operand = code[k]
        k += 1
        if operation == 0x20:
            value = data[operand // 4]
        elif operation == 0x15:
            k += true if value == operand else false
        elif operation == 0x45:
            k += true if value & operand else false
        elif operation == 0x06:
            return operand
        else:
            raise AssertionError(f"unknown instruction {operation:#x}")


PASS, KILL, EPERM, ENOSYS, ENOTTY = 0x7FFF0000, 0x80000000, 0x50001, 0x50026, 0x50019
NUMBERS = {  # from the kernel's tables
    "x86_64": (0xC000003E, {
        "read": 0, "socket": 41, "socketpair": 53, "connect": 42, "bind": 49, "fork": 57, "vfork": 58, "execve": 59,
        "execveat": 322, "kill": 62, "tgkill": 234, "tkill": 200, "clone": 56, "clone3": 435, "ptrace": 101,
        "prctl": 157, "prlimit64": 302, "fcntl": 72, "ioctl": 16, "seccomp": 317, "bpf": 321, "chmod": 90,
        "fchmodat": 268, "utimensat": 280, "memfd_create": 319, "pidfd_open": 434, "pidfd_send_signal": 424,
        "io_uring_setup": 425, "openat": 257, "openat2": 437, "rt_sigqueueinfo": 129, "setpriority": 141,
        "setresuid": 117, "shmget": 29, "mq_open": 240, "link": 86, "linkat": 265, "mknodat": 259}),
    "aarch64": (0xC00000B7, {
        "read": 63, "socket": 198, "socketpair": 199, "connect": 203, "bind": 200, "execve": 221, "execveat": 281,
        "kill": 129, "tgkill": 131, "tkill": 130, "clone": 220, "clone3": 435, "ptrace": 117, "prctl": 167,
        "prlimit64": 261, "fcntl": 25, "ioctl": 29, "seccomp": 277, "bpf": 280, "fchmodat": 53, "utimensat": 88,
        "memfd_create": 279, "pidfd_open": 434, "pidfd_send_signal": 424, "io_uring_setup": 425, "openat": 56,
        "openat2": 437, "rt_sigqueueinfo": 138, "setpriority": 140, "setresuid": 147, "shmget": 194, "mq_open": 180,
        "linkat": 37, "mknodat": 33}),
}


@pytest.mark.parametrize("machine", NUMBERS)
@pytest.mark.parametrize("processes", [0, 5])
def test_filter(machine, processes):
    code = supervisor._filter(machine, 4242, processes)
    assert len(code) <= 4096 and all(0 <= true < 256 and 0 <= false < 256 for _, true, false, _ in code)
    architecture, numbers = NUMBERS[machine]
    ask = lambda name, *arguments: judge(code, architecture, numbers[name], *arguments)  # noqa: E731
    assert ask("read") == ask("openat") == PASS
    for name in ("socket", "socketpair", "connect", "bind", "execve", "execveat", "tkill", "prctl", "seccomp", "fchmodat",
                 "utimensat", "memfd_create", "pidfd_open", "pidfd_send_signal", "openat2", "rt_sigqueueinfo", "setpriority",
                 "setresuid", "shmget", "mq_open", "linkat", "mknodat"):
        assert ask(name) == EPERM, name
    assert ask("ptrace") == ask("bpf") == ask("io_uring_setup") == KILL
    assert ask("ioctl", 1, 0x5412) == ENOTTY and ask("clone3") == ENOSYS
    for name in ("kill", "tgkill"):
        assert ask(name, 4242, 9) == PASS
        assert ask(name, 4241, 9) == ask(name, 1, 9) == ask(name, 0, 9) == ask(name, 0xFFFFFFFF, 9) == EPERM
    assert ask("prlimit64", 0) == ask("prlimit64", 4242) == PASS and ask("prlimit64", 1) == EPERM
    assert ask("fcntl", 3, 1) == ask("fcntl", 3, 1030) == PASS
    assert ask("fcntl", 3, 8) == ask("fcntl", 3, 10) == ask("fcntl", 3, 15) == ask("fcntl", 3, 1024) == EPERM
    thread = 0x3D0F00
    assert ask("clone", thread) == (PASS if processes else EPERM)
    assert ask("clone", 17) == (PASS if processes else EPERM)
    assert ask("clone", 0x10000000 | 17) == ask("clone", 0x20000 | 17) == EPERM
    for other in {"x86_64": 0x40000003, "aarch64": 0x40000028}[machine], 0xC00000F7:
        assert judge(code, other, 0) == KILL
    if machine == "x86_64":
        assert judge(code, architecture, 0x40000000 | 41) == judge(code, architecture, 0x40000000) == EPERM  # x32
        assert ask("fork") == ask("vfork") == (PASS if processes else EPERM)


def test_filter_of_unknown_machine():
    with pytest.raises(OSError, match="ppc64le"):
        supervisor._filter("ppc64le", 1, 0)


@pytest.mark.parametrize("machine, column, header", [("x86_64", 0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
                                                     ("aarch64", 1, "/usr/include/asm-generic/unistd.h")])
def test_numbers_are_those_of_the_kernel(machine, column, header):
    if not Path(header).is_file():
        pytest.skip(f"needs {header} (linux-libc-dev)")
    text = Path(header).read_text()
    truth = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    for table in (supervisor._ALLOWED, supervisor._KILLED, supervisor._WITH_PROCESSES, supervisor._SPECIAL):
        for name, number in supervisor._numbers(table, column).items():
            other = {"newfstatat": "fstatat"}.get(name, name)  # the generic table has the common name of two sizes
            assert int(truth.get(name) or truth[other]) == number, name


def test_no_thread_is_needed_by_the_caller():
    """Called from a thread that ends at once afterwards."""
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run_untrusted("print(1)")))
    thread.start()
    thread.join()
    assert outcomes[0].status == "passed"
