"""Run code that nobody has read, such as a model's answers to HumanEval: apart from the machine and within limits.

`run_untrusted` runs a program, `check_untrusted` tests one function of it from a second process, so that the verdict does
not rest on anything the program says about itself. Either starts `sandbox_supervisor.py`, which isolates, watches and ends
the program.

Isolation comes in layers, each put up by the kernel, each tried out before it is relied upon (`capabilities`):

    namespaces  own file system (Python's standard library, read-only; one scratch folder in memory, of limited size), own
                network without any interface, own process numbers: when the first process ends, the kernel ends all others
    landlock    no file opened outside the standard library and the scratch folder
    seccomp     a list of permitted system calls: no sockets, no new processes, no signals to others, no tracing

Needed are seccomp and one of the other two. Limits on CPU, memory, files and processes, an empty environment, an unused
user id where the caller is root, and a clock that kills everything come with any of them. docs/sandbox.md says what all
this guarantees and what it does not.
"""

import contextlib
import errno
import functools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

LAYERS = ("namespaces", "landlock", "seccomp")
STATUSES = ("passed", "failed", "timeout", "memory", "blocked")
_SUPERVISOR = Path(__file__).resolve().with_name("sandbox_supervisor.py")
_START = 60.0  # seconds within which a sandbox must stand, on a machine however busy


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu: whole seconds of processor time. This limit decides, because it means the same on a busy machine.
        seconds: of wall-clock time, for programs that sleep.
        memory: bytes of address space of each process. Python itself takes some 30 MB of it.
        disk: bytes the scratch folder holds, and the largest file.
        files: open files.
        processes: further processes and threads at once. More than none needs the layer `namespaces`, and a user id other
            than root's to be counted.
        output: bytes of output kept, from the end.
    """

    cpu: int = 10
    seconds: float = 30.0
    memory: int = 1 << 30
    disk: int = 16 << 20
    files: int = 64
    processes: int = 0
    output: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        status: `passed`: ran to its end, for `check_untrusted`: the test found nothing wrong. `timeout`: CPU or wall clock.
            `memory`: ended by MemoryError. `blocked`: killed for a system call that no honest program makes, or ended by
            an error of something not permitted. `failed`: anything else.
        detail: the error or signal, in one line; empty if passed.
        seconds: wall clock, from the moment the limits were in force.
        output: what was written to standard output and standard error, at most `Limits.output` bytes from the end.
        layers: the isolation that was active.
    """

    status: str
    detail: str
    seconds: float
    output: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Capabilities:
    """Isolation found to work on this machine.

    Attributes:
        layers: those that were put up and held against a probe.
        missing: for each other layer, why not.
    """

    layers: tuple[str, ...]
    missing: dict[str, str]

    @property
    def sufficient(self) -> bool:
        """Whether untrusted programs may be run here by default."""
        return "seccomp" in self.layers and len(self.layers) > 1

    def __str__(self) -> str:
        return "; ".join([f"active: {', '.join(self.layers) or 'none'}",
                          *(f"{layer} is missing: {reason}" for layer, reason in self.missing.items())])


class SandboxError(RuntimeError):
    """Nothing was run, or it cannot be told what came of it: the machine lacks what is needed. Never the program's doing."""


def run_untrusted(source: str, limits: Limits | None = None, layers: Iterable[str] | None = None) -> Outcome:
    """Run a program in the sandbox.

    `passed` means that the program came to the end of its source: neither sys.exit(0) nor os._exit(0) counts. A program that
    sets out to deceive can still find and send, from within its own process, the word by which its end is made known; where
    the verdict matters use `check_untrusted`.

    Args:
        source: Python source, run as `__main__` with the standard library and nothing else.
        limits: default `Limits()`.
        layers: the isolation to use, of `LAYERS`. Default: all that this machine has. Naming them is a decision of the
            caller to run with these and no others; `()` leaves only limits, an empty environment and another process.

    Raises:
        SandboxError: the machine lacks the layers named, or, if none are named, the least that is needed.
        ValueError: a layer that does not exist, or limits that make no sense.
    """
    return _launch([("program", {"source": source})], limits, layers)


def check_untrusted(source: str, entry_point: str, test: str, setup: str = "", limits: Limits | None = None,
                    layers: Iterable[str] | None = None) -> Outcome:
    """Test one function of a program. The test runs in a process of its own and calls the function by messages.

    Arguments and results pass by value: None, bool, int, float, complex, Decimal, Fraction, str, bytes, lists, tuples, sets
    and dicts of these. Anything else the function returns is an error, so an object that claims to be equal to everything
    does not pass. What the function writes, replaces in `builtins`, or does to its process has no way to the verdict: it
    passes by right answers and by nothing else. The function sees the arguments of each call, never the test.

    Args:
        source: Python source that defines the function.
        entry_point: name of the function.
        test: source that defines `check(candidate)`, which raises unless the candidate is right. It is confined like the
            program, and it is believed.
        setup: source that is run before the test, in its process, for names the test needs. The name `entry_point` stands
            for the tested function afterwards.
        limits: default `Limits()`; CPU, memory and files for each of the two processes.
        layers: as in `run_untrusted`.

    Raises:
        SandboxError, ValueError: as in `run_untrusted`.
    """
    return _launch([("checker", {"setup": setup, "test": test, "entry_point": entry_point}),
                    ("solution", {"source": source, "entry_point": entry_point})], limits, layers)


@functools.cache
def capabilities() -> Capabilities:
    """Which layers work here: each is put up alone, and a probe within it tries what that layer must prevent."""
    if sys.platform != "linux":
        return Capabilities((), dict.fromkeys(LAYERS, f"needs Linux, this is {platform.system()}"))
    layers, missing = [], {}
    with tempfile.TemporaryDirectory(prefix="cupel-probe-") as folder, socket.create_server(("", 0)) as server:
        os.chmod(folder, 0o755)
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as file:
            file.write("secret")
        os.chmod(secret, 0o644)
        for layer in LAYERS:
            probe = [f"files.append(open({secret!r}))"] * (layer != "seccomp")
            probe += [f"import socket; files.append(socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2))"
                      ] * (layer != "landlock")
            source = "files = []\n" + "".join(f"try: {step}\nexcept OSError: pass\n" for step in probe) + "assert not files\n"
            try:
                outcome = _launch([("program", {"source": source})], Limits(cpu=10, seconds=60), (layer,))
            except SandboxError as error:
                missing[layer] = str(error)
                continue
            if outcome.status == "passed":
                layers.append(layer)
            else:
                missing[layer] = f"was put up but does not hold: {outcome.detail}"
    return Capabilities(tuple(layers), missing)


def _launch(programs: list[tuple[str, dict]], limits: Limits | None, layers: Iterable[str] | None) -> Outcome:
    """Run programs, the first of which decides, under a supervisor of their own."""
    limits = limits or Limits()
    if layers is None:
        found = capabilities()
        if not found.sufficient:
            raise SandboxError("this machine cannot isolate untrusted code; needed are seccomp and one of namespaces and "
                               f"landlock ({found}). Use a Linux kernel of 6.2 or newer, or one that lets users make "
                               "namespaces; or name the layers to make do with, if the code is known to be harmless")
        layers = found.layers
    layers = tuple(layers)
    if unknown := set(layers) - set(LAYERS):
        raise ValueError(f"layers {sorted(unknown)}: those known are {', '.join(LAYERS)}")
    for name in ("cpu", "seconds", "memory", "disk", "files", "output"):
        if not getattr(limits, name) > 0:
            raise ValueError(f"limits.{name} is {getattr(limits, name)}: a number above 0 is needed")
    if limits.processes and "namespaces" not in layers:
        raise ValueError(f"limits.processes is {limits.processes}: more than 0 needs the layer namespaces, to end them all")
    if sys.platform != "linux":
        raise SandboxError(f"the sandbox needs Linux, this is {platform.system()}; a Linux container or virtual machine serves")
    proof = os.urandom(16).hex()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cupel-sandbox-"))
        os.chmod(folder, 0o555)  # stays empty: what is written goes to a file system of its own, or nowhere
        handles = []
        for index, (_, task) in enumerate(programs):
            # each task in a file of its own, which the other program never holds: not even in memory it inherited
            handle = os.memfd_create("task")
            stack.callback(os.close, handle)
            with open(handle, "wb", closefd=False) as file:
                file.write(json.dumps(task | ({"proof": proof} if index == 0 else {})).encode())
            os.lseek(handle, 0, os.SEEK_SET)
            handles.append(handle)
        settings = json.dumps({"parent": os.getpid(), "layers": layers, "limits": asdict(limits), "folder": folder,
                               "start": _START,
                               "programs": [(role, handle) for (role, _), handle in zip(programs, handles, strict=True)]})
        # a Python of an environment module may need this path to start; nothing else of the environment goes in
        environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        process = subprocess.Popen([sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(_SUPERVISOR), settings],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
                                   env=environment | {"PYTHONHASHSEED": "0"}, pass_fds=handles, start_new_session=True)
        try:
            answer, errors = process.communicate(timeout=limits.seconds + 2 * _START)
        except subprocess.TimeoutExpired:
            raise SandboxError("the supervisor of the sandbox gave no answer") from None
        finally:
            process.kill()
            process.communicate()
    if process.returncode or not answer:
        raise SandboxError(f"the supervisor of the sandbox ended with code {process.returncode}: "
                           f"{errors.decode(errors='replace').strip()[-500:]}")
    result = json.loads(answer)
    if result["setup"]:
        raise SandboxError(result["setup"])
    status, detail = _judge(result, proof, limits)
    detail = " ".join(detail.encode(errors="replace").decode().split())[:1000]  # the program's own words: made harmless
    return Outcome(status, detail, round(result["seconds"], 3), result["output"], layers)


def _judge(result: dict, proof: str, limits: Limits) -> tuple[str, str]:
    """Status and detail from what the supervisor saw and what the deciding program reported."""
    report = result["report"]
    if report == proof and not result["late"]:
        return "passed", ""
    if result["late"]:
        return "timeout", f"not done after {limits.seconds:g} s"
    for code, cpu in result["ends"]:  # the tested program's own end explains more than what the checker saw of it
        if code == -signal.SIGSYS:
            return "blocked", "killed for a forbidden system call"
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= limits.cpu):
            return "timeout", f"used up {limits.cpu} s of processor time"
        if code < 0 and code != -signal.SIGKILL:
            names = {known.value: known.name for known in signal.Signals}
            return "failed", f"killed by {names.get(-code, f'signal {-code}')}"
    try:
        kind, text, number = json.loads(report)
        kind, text = str(kind), str(text)
    except (ValueError, TypeError, RecursionError):
        return "failed", f"ended with code {result['ends'][-1][0]} before its end was reached"
    detail = f"{kind}: {text}" if text else kind
    if kind == "MemoryError":
        return "memory", detail
    if number in (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS):
        return "blocked", detail
    return "failed", detail
