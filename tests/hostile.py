"""Hostile programs as plain data, the bait they are after, and a report of the harm they did.

    for name in [*HOSTILE, *FORGERIES]:
        outcome, harm = attack(name)

`HOSTILE` are programs: name, then source and what must hold. A program prints REACHED and a word when it got something that
it must not get, mostly by way of `attempt`; what it prints is what `solve` returns, and the test refuses it. So each must end
as `passed`, unless `ENDS` says otherwise; beyond that the bait is looked at from outside. `FORGERIES` are wrong solutions
that try to be taken for right ones: none may pass `FORGERY_TEST`.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cupel.sandbox import Limits, Outcome, check_untrusted

# small enough that each attack ends in seconds, large enough for Python; the odd number marks the processes of this one
TIGHT = Limits(cpu=1, seconds=2 + os.getpid() / 1e8, memory=1 << 27, disk=1 << 22)

HARNESS = """
import ctypes, fcntl, glob, mmap, os, platform, resource, shutil, signal, socket, stat, subprocess, sys, threading, time
lines, libc = [], ctypes.CDLL(None, use_errno=True)
def write(*words, **_): lines.append(" ".join(map(str, words))[:1000])
def attempt(what, step):
    try: result = step()
    except BaseException: return
    if not (result is False or result == -1 or result == []): write("REACHED", what, repr(result)[:200])
def solve():
    try: exec(compile(@SOURCE@, "<program>", "exec"), {**globals(), "__name__": "__main__", "print": write})
    except BaseException as error: write(type(error).__name__)
    return lines
"""

HOSTILE: dict[str, tuple[str, str]] = {
    # ---- processes
    "fork bomb": ("""
made = 0
while True:
    try:
        if os.fork() == 0:
            while True:
                try: os.fork()
                except OSError: pass
        made += 1
    except OSError:
        break
print("REACHED", made, "children") if made else None
""", "no process is made"),
    "thread bomb": ("""
for _ in range(200):
    attempt("thread", threading.Thread(target=time.sleep, args=(60,), daemon=True).start)
""", "no thread is made"),
    "daemon by double fork": ("""
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1)
        open("@FOLDER@/daemon", "w").write("alive")
        time.sleep(60)
    os._exit(0)
print("REACHED a child")
""", "no process outlives the program"),
    "another program": ("""
attempt("shell", lambda: os.system("id > @FOLDER@/id") == 0)
attempt("subprocess", lambda: subprocess.run(["/bin/sh", "-c", "id"], check=True))
attempt("spawn", lambda: os.posix_spawn("@PYTHON@", ["python", "-c", ""], {}))
attempt("exec", lambda: os.execv("/bin/sh", ["sh", "-c", "echo exec"]))
""", "nothing is executed"),
    "kill the parent": ("""
for pid in (os.getppid(), @PARENT@, @VICTIM@):
    if pid > 1: attempt("parent", lambda: os.kill(pid, signal.SIGKILL))
try: os.kill(os.getppid(), signal.SIGKILL)
except OSError: pass
""", "the parent lives, and the outcome comes"),
    "kill everything": ("""
try:
    os.kill(@VICTIM@, 0)
except OSError:
    for target in (-1, 0):
        try: os.kill(target, signal.SIGKILL)
        except OSError: pass
else:
    print("REACHED a process of the user")
""", "no other process is signalled"),
    "stop the parent": ("""
try:
    os.kill(os.getppid(), signal.SIGSTOP)
    os.killpg(os.getpgid(os.getppid()), signal.SIGSTOP)
except OSError: pass
""", "the outcome comes in time"),
    "signal by way of a pipe": ("""
r, w = os.pipe()
try:
    os.kill(@VICTIM@, 0)
except OSError:
    try:
        fcntl.fcntl(r, 10, 9)
        fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())
        fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
        os.write(w, b"x")
    except OSError: pass
""", "the parent lives"),
    "other processes": ("""
buffer = ctypes.create_string_buffer(64)
vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 64)
for pid in (os.getppid(), @PARENT@, @VICTIM@):
    if pid > 1:
        attempt("limits", lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)))
        attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
        attempt("affinity", lambda: os.sched_setaffinity(pid, {0}))
    attempt("memory file", lambda: open(f"/proc/{pid}/mem", "r+b"))
    attempt("environment", lambda: open(f"/proc/{pid}/environ", "rb").read())
    attempt("descriptors", lambda: os.listdir(f"/proc/{pid}/fd"))
    attempt("debugging", lambda: libc.ptrace(16, pid, None, None))
    attempt("memory", lambda: libc.process_vm_readv(pid, vector, 1, vector, 1, 0))
""", "no other process is looked into or changed"),
    # ---- the kernel
    "privileges": ("""
held = (ctypes.c_uint32 * 6)()
attempt("capabilities", lambda: libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), held) or any(held))
attempt("user", lambda: os.getresuid() + os.getresgid() != (65534,) * 6)
attempt("root", lambda: os.setuid(0))
attempt("groups", lambda: os.setgroups([0]))
""", "the program is nobody and may nothing"),
    "namespaces": ("""
attempt("namespaces", lambda: libc.unshare(0x10000000 | 0x20000))
attempt("mount", lambda: libc.mount(b"none", b"/", b"tmpfs", 32, None))
attempt("root", lambda: os.chroot("."))
for _ in range(50): os.chdir("..")
attempt("secret", lambda: open("." + "@FOLDER@/secret").read())
""", "there is no way back to the machine's files"),
    "interfaces of the kernel": ("""
keyctl, bpf = {"x86_64": (250, 321), "aarch64": (219, 280)}[platform.machine()]
attempt("keys of the session", lambda: libc.syscall(keyctl, 0, -3, 1))
attempt("io_uring", lambda: libc.syscall(425, 4, ctypes.create_string_buffer(120)))
attempt("bpf", lambda: libc.syscall(bpf, 0, ctypes.create_string_buffer(120), 120))
""", "not at hand"),
    "32-bit system calls": ("""
if platform.machine() == "x86_64":
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes.fromhex("53b814000000cd805bc3"))  # getpid by int 0x80, the entry for i386
    attempt("the other table", ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page))))
""", "no way around the list of system calls"),
    # ---- network
    "network": ("""
stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
attempt("loopback", lambda: socket.create_connection(("127.0.0.1", @TCP@), 2).send(b"hello"))
attempt("ipv6", lambda: socket.create_connection(("::1", @TCP@), 2))
attempt("datagram", lambda: socket.socket(socket.AF_INET, datagram).sendto(b"hello", ("127.0.0.1", @UDP@)))
attempt("names", lambda: socket.getaddrinfo("example.org", 80))
attempt("http", lambda: __import__("urllib.request").request.urlopen("http://127.0.0.1:@TCP@/", timeout=2))
for address in ("@UNIX@", "\\0@ABSTRACT@"):
    attempt("unix", lambda: socket.socket(socket.AF_UNIX).connect(address))
    attempt("unix datagram", lambda: socket.socket(socket.AF_UNIX, datagram).sendto(b"hello", address))
attempt("packets", lambda: socket.socket(17, socket.SOCK_RAW, 3))
attempt("icmp", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("host of a virtual machine", lambda: socket.socket(40, stream))
""", "no connection, name or datagram"),
    # ---- files
    "write outside": ("""
for path in ("@FOLDER@/new", "@FOLDER@/existing", "@HOME@/.@TOKEN@", "/tmp/@TOKEN@", "/dev/shm/@TOKEN@", "/var/tmp/@TOKEN@",
             "/@TOKEN@", "/dev/@TOKEN@", "../@TOKEN@", os.__file__, "/etc/ld.so.cache"):
    attempt("write", lambda: open(path, "a").write("x"))
    attempt("truncate", lambda: os.truncate(path, 1) if os.path.exists(path) else False)
    attempt("open to truncate", lambda: os.open(path, os.O_RDONLY | os.O_TRUNC))
attempt("folder", lambda: os.mkdir("@FOLDER@/made"))
attempt("fifo", lambda: os.mkfifo("@FOLDER@/fifo"))
attempt("node", lambda: os.mknod("@FOLDER@/node"))
""", "no file is written outside the working folder"),
    "change outside": ("""
for target in ("@FOLDER@/existing", "/dev/null", 0, 1, 2):
    attempt("mode", lambda: os.chmod(target, 0o666))
    attempt("owner", lambda: os.chown(target, -1, -1))
    attempt("list of access", lambda: os.setxattr(target, "system.posix_acl_access", b"\\2\\0\\0\\0"))
attempt("time", lambda: os.utime("@FOLDER@/existing", (1, 1)))
attempt("attribute", lambda: os.setxattr("@FOLDER@/existing", "user.x", b"x"))
attempt("rename", lambda: os.rename("@FOLDER@/existing", "@FOLDER@/renamed"))
attempt("remove", lambda: os.remove("@FOLDER@/existing"))
attempt("remove all", lambda: shutil.rmtree("@FOLDER@"))
""", "nothing outside is changed, nor the machine's devices where root calls"),
    "links": ("""
try: os.symlink("@FOLDER@/existing", "link")
except OSError: pass
attempt("symbolic", lambda: open("link").read())
attempt("hard", lambda: os.link("@FOLDER@/existing", "hard"))
attempt("link outside", lambda: os.symlink("/etc/passwd", "@FOLDER@/link"))
""", "no link leads outside"),
    "read a secret": ("""
attempt("file", lambda: open("@FOLDER@/secret").read())
attempt("folder", lambda: os.listdir("@FOLDER@"))
# the way to Python's own library may lead through it, and is not secret
attempt("home", lambda: [f for f in os.listdir("@HOME@") if not os.__file__.startswith(f"@HOME@/{f}/")])
attempt("above", lambda: open("../" * 40 + "@FOLDER@/secret").read())
attempt("passwords", lambda: open("/etc/passwd").read())
attempt("project", lambda: open("@PROJECT@/pyproject.toml").read())
attempt("processes", lambda: os.listdir("/proc"))
attempt("root", lambda: os.listdir("/proc/1/root/@FOLDER@"))
""", "no file of the user is read"),
    "read the environment": ("""
print(dict(os.environ))
environment, k = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ"), 0
while environment and environment[k]:
    print(environment[k])
    k += 1
""", "the environment of the caller is not there"),
    "open descriptors": ("""
for number in range(3, 4096):
    attempt("descriptor", lambda: stat.S_IFMT(os.fstat(number).st_mode) not in (stat.S_IFIFO, stat.S_IFSOCK))
    attempt("folder", lambda: os.fchdir(number))
""", "nothing is inherited but the way to the checker"),
    "installed packages": ("""
for folder in {os.path.dirname(os.__file__), "/lib/python3", "/usr/lib/python3", *sys.path}:
    attempt("package", lambda: glob.glob(f"{folder}/*-packages/*"))
attempt("package", lambda: glob.glob("@PACKAGES@/*"))
""", "packages, one of which may hold the answers, are not there"),
    # ---- resources
    "memory": ("""
hoard = []
while True: hoard.append(bytearray(1 << 24))
""", "ends by the memory limit"),
    "memory of the machine": ("""
attempt("map", lambda: mmap.mmap(-1, 1 << 40))
attempt("shared", lambda: libc.shmget(0, 1 << 20, 0o1600))
attempt("without a name", lambda: os.memfd_create("x"))
""", "all memory counts"),
    "huge file": ("""
def fill():
    with open("huge", "wb") as file:
        for _ in range(1000): file.write(b"x" * (1 << 20))
def sparse():
    with open("sparse", "wb") as file: file.truncate(1 << 40)
attempt("huge", fill)
attempt("sparse", sparse)
""", "ends by the disk limit"),
    "much in many files": ("""
def fill():
    for k in range(100):
        with open(str(k), "wb") as file: file.write(b"x" * (1 << 20))
attempt("much", fill)
""", "ends by the disk limit, which is for all files together"),
    "many files": ("for k in range(10**8): open(str(k), 'w')", "ends by a time limit: empty files take no disk"),
    "endless loop": ("while True: pass", "ends by the time limit"),
    "endless loop that will not die": ("""
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True:
    try:
        while True: pass
    except BaseException: pass
""", "ends by the time limit"),
    "endless sleep": ("while True: time.sleep(1000)", "ends by the clock"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass", "ends by the clock or CPU limit"),
    "endless output": ("while True: sys.stdout.write('x' * 65536)", "ends by a time limit, and no output is kept"),
    "deep recursion": ("def f(x): return f(x + 1) + f(x)\nsys.setrecursionlimit(10**9)\nf(0)", "ends by itself or by a limit"),
    "deep recursion in C": ("""
sys.setrecursionlimit(10**9)
nested = []
for _ in range(10**6): nested = [nested]
repr(nested)
""", "ends by itself or by a limit"),
    "nested source": ("exec('(' * 5000 + ')' * 5000)", "ends by itself"),
    "broken memory": ("ctypes.memset(8, 0, 64)", "ends by itself"),
    "higher limits": ("""
for name in ("CPU", "AS", "FSIZE", "NOFILE", "CORE"):
    attempt(name, lambda: resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (1 << 40, 1 << 40)))
""", "limits stay"),
}

ENDS: dict[str, set[str]] = {
    "kill everything": {"failed"}, "broken memory": {"failed"}, "nested source": {"passed", "failed"},
    "deep recursion": {"passed", "failed", "timeout"}, "deep recursion in C": {"passed", "failed", "timeout"},
    **{name: {"timeout"} for name in ("many files", "endless loop", "endless loop that will not die", "endless sleep",
                                      "stopped", "endless output")},
}

FORGERY_TEST = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate([1]) == [1, 1]\n"

FORGERIES: dict[str, tuple[str, str]] = {
    "sys.exit(0)": ("import sys\nsys.exit(0)\nassert False", "does not pass"),
    "os._exit(0)": ("import os\nos._exit(0)\nassert False", "does not pass"),
    "exit by signal": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nassert False", "does not pass"),
    "exit by a signal without a name": ("import os\nos.kill(os.getpid(), 40)\nassert False", "does not pass"),
    "error with a strange text": ("raise type('\\ud800\\n' * 100, (Exception,), {})('\\0\\udcff\\n\\x1b[2J' * 10**6)",
                                  "is told in one line that can be written to any file"),
    "error that cannot be told": ("""
class Mute(Exception):
    errno = property(lambda self: 1 / 0)
    def __str__(self): raise self
    __repr__ = __str__
raise Mute
""", "does not pass"),
    "nonsense for a report": ("""
import os
for number in range(3, 64):
    for text in ("1" * 70000, "[" * 70000, "N.", "(NNN.", "cos\\nsystem\\n(S'true'\\ntR."):
        try: os.write(number, text.encode())
        except OSError: pass
os._exit(0)
""", "does not pass"),
    "other builtins": ("""
import builtins, json, os, sys
class Calm(Exception): pass
builtins.AssertionError = Calm
builtins.BaseException = Calm
builtins.exec = builtins.compile = lambda *a, **k: None
os._exit = sys.exit = lambda *a: None
json.dumps = lambda *a, **k: "passed"
sys.excepthook = lambda *a: None
assert False
""", "does not pass"),
    "says that it passed": ("""
import atexit, os
atexit.register(print, "passed")
for number in range(64):
    for text in (b'ready\\n["passed", ""]\\n', b"passed"):
        try: os.write(number, text)
        except OSError: pass
assert False
""", "does not pass"),
    "equal to everything": ("""
class Anything:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def solve(x): return Anything()
""", "a value of an own type is refused"),
    "equal to everything, a number": ("""
class Anything(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def solve(x): return Anything(0)
""", "a number arrives as a plain number"),
    "equal to everything, a list": ("""
class Anything(list):
    def __eq__(self, other): return True
    def __iter__(self): return iter([Anything()])
def solve(x): return Anything([Anything()])
""", "a list arrives as a plain list"),
    "runs code where it is read": ("""
import os
class Trick:
    def __reduce__(self): return os._exit, (0,)
def solve(x): return Trick()
""", "no class or function is looked up"),
    "changes a class where it is read": ("""
import collections, os
for number in range(3, 64):
    try: os.write(number, b"(ccollections\\nCounter\\nNN\\x86b." * 2)
    except OSError: pass
def solve(x): return collections.Counter(x)
""", "no class or function is looked up"),
    "leaves": ("import os\ndef solve(x): os._exit(0)", "no answer is no success"),
    "leaves at once": ("import os\nos._exit(0)", "no answer is no success"),
    "raises SystemExit": ("import sys\ndef solve(x): sys.exit(0)", "no answer is no success"),
    "other builtins for the test": ("""
import builtins, json, sys
builtins.AssertionError = type("Calm", (BaseException,), {})
builtins.exec = builtins.compile = builtins.eval = lambda *a, **k: None
sys.exit = lambda *a: None
json.loads = lambda *a: True
def solve(x): return None
""", "the test runs in another process"),
    "searches for the proof": ("""
import gc, os, re, sys
def everything():
    frame = sys._getframe()
    while frame:
        yield repr(frame.f_locals)
        yield repr(frame.f_globals)
        frame = frame.f_back
    for thing in gc.get_objects():
        try: yield repr(thing)[:100000]
        except Exception: pass
    yield repr(sys.argv)
found = {word for text in everything() for word in re.findall(r"\\b[0-9a-f]{32}\\b", text)}
for word in found:
    for number in range(64):
        try: os.write(number, word.encode())
        except OSError: pass
def solve(x): return None
""", "what proves success is not in this process"),
    "searches for the test": ("""
import gc, sys
marks = [t for t in gc.get_objects() if isinstance(t, (str, dict)) and "assert candidate" in str(t)[:10**5]]
print("REACHED the test") if marks else None
def solve(x): return None
""", "the test is not in this process"),
    "answers before it is asked": ("""
import os
for number in range(3, 64):
    for line in (b'[null, null]', b'[["int", "0x9"], null]', b'passed', b'true'):
        try: os.write(number, line + b"\\n")
        except OSError: pass
def solve(x): return None
""", "only right answers to each question pass"),
    "writes nonsense": ("""
import os
def solve(x):
    for number in range(3, 64):
        try: os.write(number, b'[' * 100000 + b"\\n")
        except OSError: pass
""", "nonsense is no answer"),
    "endless answer": ("""
import os
def solve(x):
    while True:
        for number in range(3, 8):
            try: os.write(number, b'x' * 65536)
            except OSError: pass
""", "ends by a limit"),
    "deep answer": ("""
def solve(x):
    nested = []
    for _ in range(10**5): nested = [nested]
    return nested
""", "ends with an error"),
    "attacks its neighbours": ("""
import os, signal
def solve(x):
    for pid in range(1, 20):
        if pid != os.getpid():
            try: os.kill(pid, signal.SIGTERM)
            except OSError: pass
    return None
""", "a checker that is gone has not approved"),
    "files for the checker": ("""
import os
for name in ("json", "decimal", "fractions", "random", "sitecustomize"):
    try: open(name + ".py", "w").write("import os; os._exit(0)")
    except OSError: pass
def solve(x): return None
""", "the checker imports nothing from the scratch folder"),
}


class Bait:
    """Things a hostile program would reach for, and a look at them afterwards.

    A folder that anybody may read and write, with a secret and a file; a variable of the environment; listening sockets;
    a process of the same user. All are really within reach: `fill` a program and run it without the sandbox, and it reports.
    """

    def __enter__(self) -> "Bait":
        self.stack = contextlib.ExitStack()
        self.token = f"cupel-bait-{secrets.token_hex(8)}"
        self.secret = secrets.token_hex(16)
        # not tempfile's private folder: the sandbox has to protect it, not its mode
        self.folder = Path(tempfile.mkdtemp(prefix="cupel-bait-"))
        self.stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.chmod(0o777)
        for name in ("secret", "existing"):
            (self.folder / name).write_text(self.secret)
            (self.folder / name).chmod(0o666)
        os.environ["CUPEL_BAIT"] = self.secret
        self.stack.callback(os.environ.pop, "CUPEL_BAIT", None)
        self.contacts: list[str] = []
        self.addresses = {}
        for name, family, kind, address in (("TCP", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
                                            ("UDP", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
                                            ("UNIX", socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "socket")),
                                            ("ABSTRACT", socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{self.token}")):
            listener = self.stack.enter_context(socket.socket(family, kind))
            listener.bind(address)
            listener.settimeout(0.1)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            self.addresses[name] = listener.getsockname()[1] if family == socket.AF_INET else address.strip("\0")
            threading.Thread(target=self._listen, args=(name, listener), daemon=True).start()
        (self.folder / "socket").chmod(0o777)
        self.victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={})
        self.stack.callback(self.victim.wait)
        self.stack.callback(self.victim.kill)
        self.before = self._look()
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def _listen(self, name: str, listener: socket.socket) -> None:
        while True:
            try:
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()[0].close()
                else:
                    listener.recv(64)
                self.contacts.append(name)
            except TimeoutError:
                continue
            except OSError:  # closed: the end of the test
                return

    def _look(self) -> dict:
        found = {}
        for path in sorted(self.folder.glob("*")):
            state = path.lstat()
            content = path.read_text() if path.is_file() else ""
            found[path.name] = (content, state.st_mode, state.st_mtime, state.st_nlink)
        return found

    def fill(self, source: str) -> str:
        """A program of `HOSTILE` or `FORGERIES` with the places of this bait."""
        names = {**self.addresses, "FOLDER": self.folder, "HOME": Path.home(), "TOKEN": self.token, "PARENT": os.getpid(),
                 "VICTIM": self.victim.pid, "PYTHON": sys.executable, "PROJECT": Path(__file__).parents[1],
                 "PACKAGES": Path(os.__file__).parent / "site-packages"}
        for name, value in names.items():
            source = source.replace(f"@{name}@", str(value))
        return source

    def program(self, name: str) -> str:
        """A solution whose `solve` runs a program of `HOSTILE` and returns what it prints."""
        return HARNESS.replace("@SOURCE@", repr(self.fill(HOSTILE[name][0])))

    def harm(self, told: str) -> list[str]:
        """What went wrong, in words, if a program told this much; empty if all held."""
        found = [told] if "REACHED" in told or self.secret in told else []
        if self._look() != self.before:
            found.append("the folder has changed")
        for path in (Path.home() / f".{self.token}", *(Path(top, self.token) for top in ("/tmp", "/dev/shm", "/var/tmp", "/"))):
            if path.exists():
                found.append(f"{path} was written")
                path.unlink()
        if self.victim.poll() is not None:
            found.append("a process of the user was killed")
        if left := survivors():
            found.append(f"processes are left: {left}")
        return found + [f"contact by {name}" for name in self.contacts]


def survivors(patience: float = 2.0) -> list[str]:
    """Processes of sandboxes that this process started and that are still there after a moment."""
    deadline = time.monotonic() + patience
    while (found := processes(str(TIGHT.seconds))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def processes(words: str) -> list[str]:
    """Processes of this machine with these words in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def attack(name: str) -> tuple[Outcome, list[str]]:
    """Run one program of `HOSTILE` or `FORGERIES`; the outcome, and all that did not hold."""
    with Bait() as bait:
        if name in HOSTILE:
            source, expected = bait.program(name), ENDS.get(name, {"passed"})
            test = (f"def check(solve):\n    lines = solve()\n"
                    f"    assert not [line for line in lines if 'REACHED' in line or {bait.secret!r} in line], lines")
        else:
            source, expected, test = bait.fill(FORGERIES[name][0]), {"failed", "timeout"}, FORGERY_TEST
        outcome = check_untrusted(source, "solve", test, limits=TIGHT)
        harm = bait.harm(outcome.detail)
        if outcome.status not in expected:
            harm.append(f"status {outcome.status} ({outcome.detail}) instead of {' or '.join(sorted(expected))}")
        if "\n" in outcome.detail or outcome.detail.encode(errors="ignore").decode() != outcome.detail:
            harm.append(f"detail {outcome.detail!r} cannot be written to a file as one line")
        return outcome, harm
