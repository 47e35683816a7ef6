"""The supervisor of the sandbox: a script that `cupel.text.sandbox` starts in a process of its own, with one argument.

    caller > supervisor > keeper (process 1 of its namespaces) > the program; for a test: the checker, and the solution

The supervisor enters new namespaces and starts the keeper. The keeper builds the root directory and starts the programs; they
confine themselves (limits, user id, capabilities, Landlock, seccomp) before they read the code they are to run. A program is
the supervisor's own interpreter, forked: none is executed in the sandbox, so that executing can be forbidden altogether.
The supervisor collects output and reports, ends everything when the time is up, and prints what happened as one JSON object.

Only the standard library is imported: this file is run by itself, with Linux only.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import select
import signal
import sys
import time
import traceback
import types

_HOME = "/sandbox"
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _call(name: str, *arguments) -> int:
    """A function of libc; raises OSError where it returns -1."""
    values = [ctypes.c_char_p(a.encode()) if isinstance(a, str) else ctypes.c_void_p(a) if isinstance(a, int) else a
              for a in arguments]
    result = getattr(_libc, name)(*values)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, value, 0, 0, 0)


_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends; end now if it already has."""
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _supervise(settings: dict) -> dict:
    """Start the keeper, collect output and reports, end everything when the time is up. Returns what happened."""
    _die_with(settings["parent"])
    _prctl(_SET_SUBREAPER, 1)  # whatever outlives the keeper becomes a child of this process, where it is found
    limits = settings["limits"]
    if "namespaces" in settings["layers"]:
        _unshare()
    pipes = {name: os.pipe() for name in ("ready", "output", "report", "ends")}
    supervisor, keeper = os.getpid(), os.fork()
    if keeper == 0:
        try:
            _prctl(_SET_PDEATHSIG, signal.SIGKILL)
            # process 1 of a namespace has a parent outside, which it sees as 0
            if os.getppid() not in (0, supervisor):
                os._exit(1)
            _keep(settings, supervisor, {name: ends[1] for name, ends in pipes.items()})
        except BaseException as error:
            os.write(pipes["ready"][1], f"!{_told(error)}".encode()[:4000])
        os._exit(0)
    for _, end in pipes.values():
        os.close(end)
    names = {ends[0]: name for name, ends in pipes.items()}
    kept, caps = dict.fromkeys(pipes, b""), {"ready": 4096, "report": 1 << 16, "ends": 1 << 16}
    poll = select.poll()
    for handle in names:
        os.set_blocking(handle, False)
        poll.register(handle, select.POLLIN)
    started, late, ready, over = time.monotonic(), False, False, False
    deadline = started + settings["start"]

    def take(handle: int) -> bool:
        """Read what is there; False at the end of the pipe."""
        name = names[handle]
        try:
            block = os.read(handle, 1 << 16)
        except BlockingIOError:
            return True
        # of the output the end is kept, of the rest the beginning: nobody can fill this process's memory
        kept[name] = (kept[name] + block)[-limits["output"]:] if name == "output" else (kept[name] + block)[:caps[name]]
        return bool(block)

    while not over:
        left = deadline - time.monotonic()
        if left <= 0:
            late = True
            break
        for handle, _ in poll.poll(1000 * left):
            if not take(handle):
                poll.unregister(handle)
                over |= names[handle] == "ends"  # only the keeper holds the other side of this one
        if not ready and kept["ready"] == b"." * len(settings["programs"]):
            ready, started = True, time.monotonic()
            deadline = started + limits["seconds"]
    seconds = time.monotonic() - started
    with contextlib.suppress(ProcessLookupError):
        os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    _reap()
    for handle, name in names.items():
        for _ in range(64):  # the rest of what lay in the pipes: at most 1 MiB each, whoever may have enlarged them
            before = kept[name]
            if not take(handle) or kept[name] == before:
                break
    setup = ""
    if not ready or not (late or kept["ends"]):
        setup = kept["ready"].lstrip(b".!").decode(errors="replace") or (
            "the sandbox did not stand in time" if late else "a process of the sandbox died that was no program")
    return {"setup": setup, "late": late, "seconds": seconds, "output": kept["output"].decode(errors="replace"),
            "report": kept["report"].decode(errors="replace"),
            "ends": json.loads(kept["ends"] or b"[]")}


def _reap() -> None:
    """Kill every process left below this one. With namespaces the kernel has done so already."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                if parent == os.getpid():
                    os.kill(int(name), signal.SIGKILL)
        time.sleep(0.001)


_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000


def _unshare() -> None:
    """Enter new namespaces: as root directly, as anybody else by a user namespace, where the user is called nobody."""
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    try:
        _call("unshare", flags)
    except PermissionError:
        user, group = os.geteuid(), os.getegid()
        try:
            _call("unshare", flags | _NEWUSER)
            for name, text in (("setgroups", "deny"), ("gid_map", f"65534 {group} 1"), ("uid_map", f"65534 {user} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} (users may not make namespaces here; see the kernel settings "
                                       "user.max_user_namespaces and kernel.unprivileged_userns_clone)") from None


def _keep(settings: dict, supervisor: int, pipes: dict[str, int]) -> None:
    """Start the programs, wait until the first has ended, end the others, tell how each ended."""
    if "namespaces" in settings["layers"]:
        _build_root(settings["limits"]["disk"])
    # the checker asks by one pipe, the solution answers by the other
    ask, answer = os.pipe(), os.pipe()
    channels = {"program": [], "checker": [ask[1], answer[0]], "solution": [answer[1], ask[0]]}
    keeper, running = os.getpid(), []
    for index, (role, task) in enumerate(settings["programs"]):
        process = os.fork()
        if process == 0:
            report = pipes["report"] if index == 0 else os.open("/dev/null", os.O_WRONLY)
            # a user id that nobody has, another for each program of each sandbox
            user = (1 << 30) + 2 * supervisor + index
            _program(role, [pipes["ready"], task, report, *channels[role]], pipes["output"], settings, keeper, user)
        running.append(process)
    for handle in (*ask, *answer, pipes["ready"], pipes["output"], pipes["report"]):
        os.close(handle)
    ends = {}
    while running[0] not in ends:
        process, status, usage = os.wait4(-1, 0)  # as process 1 the keeper also inherits orphans
        ends[process] = (os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)
    for process in running[1:]:
        if process not in ends:
            os.kill(process, signal.SIGKILL)  # one that was already on its way out keeps its own end
            _, status, usage = os.wait4(process, 0)
            ends[process] = (os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)
    # the solution first: its end explains the checker's
    os.write(pipes["ends"], json.dumps([ends[process] for process in reversed(running)]).encode())


def _packages(folder: str) -> list[str]:
    """Folders of installed packages in a library folder: one may well contain the solutions of a benchmark."""
    return [path for name in ("site-packages", "dist-packages") if os.path.isdir(path := os.path.join(folder, name))]


def _readable() -> tuple[list[str], list[str], list[str]]:
    """Folders of Python's library, folders of shared libraries, single files: what a program needs of the machine."""
    stdlib = [path for path in sys.path if os.path.isdir(path)]
    with open("/proc/self/maps") as file:
        mapped = {os.path.dirname(line.split(maxsplit=5)[5].strip()) for line in file if ".so" in line}
    triplet = getattr(sys.implementation, "_multiarch", "")
    usual = {"/lib64", "/usr/lib64", f"/lib/{triplet}", f"/usr/lib/{triplet}"}
    libraries = sorted(path for path in mapped | usual if os.path.isdir(path) and path not in stdlib and path != "/")
    single = [path for path in ("/etc/ld.so.cache", "/usr/share/zoneinfo") if os.path.exists(path)]
    return stdlib, libraries, [*single, *(path for path in sys.path if os.path.isfile(path))]


_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DEVICES = ("/dev/null", "/dev/urandom")


def _build_root(disk: int) -> None:
    """Make a root of the standard library, read-only, and a scratch folder in memory; leave the machine's root for it."""
    os.umask(0o022)
    _call("sethostname", "sandbox", 7)
    _call("mount", None, "/", None, _REC | _PRIVATE, None)
    stdlib, libraries, single = _readable()
    covered: list[str] = []
    for path in sorted({*stdlib, *libraries, *single, *_DEVICES}):  # a folder comes before what it contains
        if not any(path.startswith(above + "/") for above in covered):
            covered.append(path)
    # opened first: the new root is put together on /tmp, and some of this may lie there
    handles = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in covered}
    root = "/tmp"
    _call("mount", "tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path, handle in handles.items():
        target = root + path
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        _call("mount", f"/proc/self/fd/{handle}", target, None, _BIND | _REC, None)
        _read_only(target, path in _DEVICES)
        os.close(handle)
    pythons = {root + folder for folder in stdlib}
    for folder in libraries:
        pythons |= {entry.path for entry in os.scandir(root + folder) if entry.name.startswith("python") and entry.is_dir()}
    for path in sorted(path for folder in pythons for path in _packages(folder)):
        _call("mount", "tmpfs", path, "tmpfs", _NOSUID | _NODEV | _RDONLY, "size=4k,mode=555")
    os.mkdir(root + _HOME)
    inodes = max(64, disk >> 12)
    _call("mount", "tmpfs", root + _HOME, "tmpfs", _NOSUID | _NODEV | _NOEXEC, f"size={disk},nr_inodes={inodes},mode=777")
    _call("mount", None, root, None, _REMOUNT | _RDONLY | _NOSUID | _NODEV, "size=1m,mode=755")
    os.chdir(root)
    _call("pivot_root", ".", ".")
    _call("umount2", ".", 2)  # MNT_DETACH: the old root lies on top, and goes
    os.chdir(_HOME)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user")]


def _read_only(target: str, device: bool) -> None:
    """Make a bound folder read-only with all that is mounted below it; before Linux 5.12 only itself."""
    attributes = _MountAttributes(set=_RDONLY | _NOSUID | (0 if device else _NODEV))
    try:  # mount_setattr; its bits for read-only, nosuid and nodev are the same as mount's
        _call("syscall", 442, -100, target, 0x8000, ctypes.byref(attributes), ctypes.sizeof(attributes))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        # bits that the folder already has must be given again, and happen to be the same in both calls
        has = os.statvfs(target).f_flag & (_NOSUID | _NODEV | _NOEXEC | 1024 | 2048 | 0x200000)
        _call("mount", None, target, None, _REMOUNT | _BIND | _RDONLY | has, None)


# ---- Landlock ---------------------------------------------------------------------------------------------------------

_READ_FILE, _READ_DIR, _TRUNCATE, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 14, 1 << 1
# all but execute, make char/block devices, sockets and fifos, ioctl on devices
_SCRATCH = _WRITE_FILE | _READ_FILE | _READ_DIR | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13 | _TRUNCATE


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scope", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def _landlock_rules(namespaces: bool) -> int:
    """Handle of a ruleset for `_landlock_enforce`.

    Raises:
        OSError: the kernel has no Landlock, or one older than version 3, which could not forbid truncating files.
    """
    try:
        version = _call("syscall", 444, None, 0, 1)
    except OSError as error:
        raise OSError(error.errno, "the kernel has no Landlock, or it is not switched on") from None
    if version < 3:
        raise OSError(errno.ENOSYS, f"Landlock of the kernel is version {version}, 3 is needed (Linux 6.2)")
    rules = _Ruleset(files=(1 << (16 if version >= 5 else 15)) - 1, network=3, scope=3)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call("syscall", 444, ctypes.byref(rules), size, 0)

    def allow(path: str, rights: int) -> None:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        _call("syscall", 445, ruleset, 1, ctypes.byref(_Beneath(rights, handle)), 0)
        os.close(handle)

    if namespaces:  # the root holds nothing but what may be read
        allow("/", _READ_FILE | _READ_DIR)
        allow(_HOME, _SCRATCH)
    else:
        stdlib, libraries, single = _readable()
        for folder in [*stdlib, *libraries]:
            entries = {entry.path for entry in os.scandir(folder)}
            hidden = {*_packages(folder)} | {path for path in entries if folder in libraries
                                             and os.path.basename(path).startswith("python") and os.path.isdir(path)}
            allow(folder, _READ_DIR | (0 if hidden else _READ_FILE))
            # rights reach everything below, so packages are spared by naming their neighbours
            for path in filter(os.path.exists, entries - hidden if hidden else ()):
                allow(path, _READ_FILE | _READ_DIR)
        for path in [*single, os.getcwd()]:
            allow(path, _READ_FILE | _READ_DIR)
    allow("/dev/null", _READ_FILE | _WRITE_FILE | _TRUNCATE)
    allow("/dev/urandom", _READ_FILE)
    return ruleset


# ---- seccomp ----------------------------------------------------------------------------------------------------------

# name, number on x86_64, number on aarch64 (from the kernel's unistd.h; the second architecture lacks the older calls)
_ALLOWED = """
read 0 63 write 1 64 readv 19 65 writev 20 66 pread64 17 67 pwrite64 18 68 preadv 295 69 pwritev 296 70 open 2 - openat 257 56
close 3 57 close_range 436 436 stat 4 - fstat 5 80 lstat 6 - newfstatat 262 79 statx 332 291 access 21 - faccessat 269 48
faccessat2 439 439 readlink 89 - readlinkat 267 78 getcwd 79 17 chdir 80 49 fchdir 81 50 getdents 78 - getdents64 217 61
lseek 8 62 dup 32 23 dup2 33 - dup3 292 24 pipe 22 - pipe2 293 59 truncate 76 45 ftruncate 77 46 fsync 74 82 fdatasync 75 83
flock 73 32 fallocate 285 47 fadvise64 221 223 mkdir 83 - mkdirat 258 34 rmdir 84 - unlink 87 - unlinkat 263 35 rename 82 -
renameat 264 38 renameat2 316 276 symlink 88 - symlinkat 266 36 umask 95 166 statfs 137 43 fstatfs 138 44
copy_file_range 326 285 sendfile 40 71 mmap 9 222 munmap 11 215 mprotect 10 226 mremap 25 216 brk 12 214 madvise 28 233
poll 7 - ppoll 271 73 select 23 - pselect6 270 72 epoll_create 213 - epoll_create1 291 20 epoll_ctl 233 21 epoll_wait 232 -
epoll_pwait 281 22 nanosleep 35 101 clock_nanosleep 230 115 clock_gettime 228 113 clock_getres 229 114 gettimeofday 96 169
time 201 - alarm 37 - setitimer 38 103 getitimer 36 102 times 100 153 rt_sigaction 13 134 rt_sigprocmask 14 135
rt_sigreturn 15 139 rt_sigpending 127 136 rt_sigtimedwait 128 137 rt_sigsuspend 130 133 sigaltstack 131 132 pause 34 -
restart_syscall 219 128 getpid 39 172 getppid 110 173 gettid 186 178 getuid 102 174 geteuid 107 175 getgid 104 176
getegid 108 177 getresuid 118 148 getresgid 120 150 getgroups 115 158 getpgrp 111 - getpgid 121 155 getsid 124 156 uname 63 160
sysinfo 99 179 getrusage 98 165 getrlimit 97 163 setrlimit 160 164 sched_yield 24 124 sched_getaffinity 204 123
getcpu 309 168 getpriority 140 141 wait4 61 260 waitid 247 95 exit 60 93 exit_group 231 94 futex 202 98
set_robust_list 273 99 rseq 334 293 set_tid_address 218 96 arch_prctl 158 - getrandom 318 278 membarrier 324 283 capget 125 90
"""
_WITH_PROCESSES = "fork 57 - vfork 58 - setsid 112 157 setpgid 109 154"
_KILLED = """
ptrace 101 117 process_vm_readv 310 270 process_vm_writev 311 271 bpf 321 280 keyctl 250 219 add_key 248 217
request_key 249 218 userfaultfd 323 282 perf_event_open 298 241 io_uring_setup 425 425 mount 165 40 umount2 166 39
pivot_root 155 41 chroot 161 51 setns 308 268 unshare 272 97 init_module 175 105 finit_module 313 273 delete_module 176 106
kexec_load 246 104 kexec_file_load 320 294 reboot 169 142 swapon 167 224 swapoff 168 225 open_by_handle_at 304 265
pidfd_getfd 438 438
"""
_SPECIAL = "kill 62 129 tgkill 234 131 prlimit64 302 261 fcntl 72 25 ioctl 16 29 clone 56 220 clone3 435 435"
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_*
_PASS, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# commands of fcntl: duplicate, flags, locks, pipe size. Not those that have the kernel send signals to another process
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)


def _numbers(table: str, column: int) -> dict[str, int]:
    words = table.split()
    return {words[i]: int(words[i + 1 + column]) for i in range(0, len(words), 3) if words[i + 1 + column] != "-"}


def _filter(machine: str, process: int, processes: int) -> list[tuple[int, int, int, int]]:
    """The seccomp filter as BPF instructions (code, jump if true, jump if false, operand).

    System calls off the list are refused with EPERM, those of `_KILLED` end the process. Signals and limits reach only the
    process itself; ioctl finds no terminal; clone3, whose flags cannot be read here, does not exist, so that libc uses clone.

    Raises:
        OSError: no system call numbers are known for this kind of machine.
    """
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no system call numbers are known for {machine}")
    column, architecture = _MACHINES[machine]
    load, equal, has, give = 0x20, 0x15, 0x45, 0x06
    special = _numbers(_SPECIAL, column)
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, _KILL), (load, 0, 0, 0)]
    tables = [(_ALLOWED, _PASS), (_KILLED, _KILL)] + [(_WITH_PROCESSES, _PASS)] * bool(processes)
    verdicts = [(number, verdict) for table, verdict in tables for number in _numbers(table, column).values()]
    verdicts += [(special["ioctl"], _REFUSE | errno.ENOTTY), (special["clone3"], _REFUSE | errno.ENOSYS)]
    for number, verdict in verdicts:
        code += [(equal, 0, 1, number), (give, 0, 0, verdict)]
    for name, argument, values in (("kill", 0, (process,)), ("tgkill", 0, (process,)), ("prlimit64", 0, (0, process)),
                                   ("fcntl", 1, _FCNTL)):
        block = [(load, 0, 0, 16 + 8 * argument)]
        for value in values:
            block += [(equal, 0, 1, value), (give, 0, 0, _PASS)]
        block += [(give, 0, 0, _REFUSE | errno.EPERM)]
        code += [(equal, 0, len(block), special[name]), *block]
    if processes:  # clone, but not into new namespaces
        code += [(equal, 0, 4, special["clone"]), (load, 0, 0, 16), (has, 0, 1, 0x7E020080),
                 (give, 0, 0, _REFUSE | errno.EPERM), (give, 0, 0, _PASS)]
    return [*code, (give, 0, 0, _REFUSE | errno.EPERM)]


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("true", ctypes.c_uint8), ("false", ctypes.c_uint8), ("operand", ctypes.c_uint32)]


class _Code(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("start", ctypes.POINTER(_Instruction))]


def _seccomp_enforce(processes: int) -> None:
    rows = _filter(platform.machine(), os.getpid(), processes)
    code = _Code(len(rows), (_Instruction * len(rows))(*rows))
    _call("prctl", _SET_SECCOMP, 2, ctypes.byref(code), 0, 0)


# ---- the programs -----------------------------------------------------------------------------------------------------

def _told(error: BaseException) -> str:
    """An error in one line."""
    text = error.strerror + f": {error.filename}" * bool(error.filename) if isinstance(error, OSError) and error.strerror else (
        f"{type(error).__name__}: {error}")
    return text.replace("\n", " ")


def _program(role: str, handles: list[int], output: int, settings: dict, keeper: int, user: int) -> None:
    """A program's process, from the fork to its end: lock everything down, tell that it is done, run. Never returns."""
    ready, task, report, *channel = _take(handles, output)
    try:
        _confine(settings, keeper, user)
        with open(task, "rb") as file:
            task = json.load(file)
        proof = task.pop("proof", "").encode()
        import random

        random.seed(0)
        os.write(ready, b".")
        os.close(ready)
    except BaseException as error:
        os.write(ready, f"!{_told(error)}".encode()[:4000])
        os._exit(1)
    # taken now, because the program can replace what these names stand for
    write, leave, flush = os.write, os._exit, _flush
    try:
        {"program": _be_program, "checker": _be_checker, "solution": _be_solution}[role](task, *channel)
        flush()
    except BaseException as error:
        with contextlib.suppress(BaseException):
            write(report, _report(error))
            _show(error)
        leave(1)
    write(report, proof)
    leave(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _show(error: BaseException) -> None:
    """Print an error with the lines that led to it, without those of this file."""
    told = traceback.TracebackException.from_exception(error)
    told.stack = traceback.StackSummary.from_list([frame for frame in told.stack if frame.filename != __file__])
    sys.stderr.write("".join(told.format(chain=False)))
    _flush()


def _report(error: BaseException) -> bytes:
    if isinstance(error, SolutionError):
        return json.dumps([error.kind, error.text, error.number]).encode()
    try:
        text = str(error)[:500]
    except Exception:
        text = ""
    number = getattr(error, "errno", None)
    return json.dumps([type(error).__name__[:100], text, number if type(number) is int else None]).encode()


def _take(handles: list[int], output: int) -> list[int]:
    """Keep nothing open but an empty input, the output, and `handles`. Returns the new numbers of these."""
    import fcntl

    high = [fcntl.fcntl(handle, fcntl.F_DUPFD, 100) for handle in (os.open("/dev/null", os.O_RDONLY), output, output, *handles)]
    for number, handle in enumerate(high):
        os.dup2(handle, number, inheritable=False)
    os.closerange(len(high), 1 << 20)
    return list(range(3, len(high)))


def _confine(settings: dict, keeper: int, user: int) -> None:
    """Put up limits and layers around this process."""
    import resource

    limits, layers = types.SimpleNamespace(**settings["limits"]), settings["layers"]
    os.setsid()
    _die_with(keeper)
    folder = _HOME if "namespaces" in layers else settings["folder"]
    os.environ.clear()
    os.environ.update({"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
    ruleset = _landlock_rules("namespaces" in layers) if "landlock" in layers else None
    _drop_user(user)
    # the kernel counts processes of a user: in a user namespace those of the sandbox, else this one of a user of its own
    already = 1 if os.getuid() == user else 2 + len(settings["programs"])
    processes = limits.processes + already if limits.processes else 0
    for name, value, hard in (("CPU", limits.cpu, limits.cpu + 1), ("AS", limits.memory, None), ("FSIZE", limits.disk, None),
                              ("NOFILE", limits.files, None), ("NPROC", processes, None), ("STACK", 8 << 20, None),
                              ("CORE", 0, None), ("MEMLOCK", 0, None), ("MSGQUEUE", 0, None)):
        kind = getattr(resource, f"RLIMIT_{name}")
        ceiling = resource.getrlimit(kind)[1]
        hard = min(hard or value, ceiling) if ceiling != resource.RLIM_INFINITY else hard or value
        resource.setrlimit(kind, (min(value, hard), hard))
    _drop_capabilities()
    _prctl(_SET_NO_NEW_PRIVS, 1)
    if ruleset is not None:
        _call("syscall", 446, ruleset, 0)
        os.close(ruleset)
    _die_with(keeper)  # again: a change of user undoes it
    if "seccomp" in layers:
        _seccomp_enforce(limits.processes)


_CAPABILITIES = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process


def _drop_user(user: int) -> None:
    """As root become `user`, or nobody, for good.

    Not where that user could not read the standard library, nor where root lacks the capability to kill processes of
    others (as in some containers): the program must not outlive its time.
    """
    held = (ctypes.c_uint32 * 6)()
    _call("capget", ctypes.byref(_CAPABILITIES), ctypes.byref(held))
    if os.geteuid() or not held[0] & 1 << 5:
        return
    with contextlib.suppress(OSError):  # a user namespace may forbid it
        os.setgroups([])
    for identity in (user, 65534):
        try:
            os.setegid(identity)
            os.seteuid(identity)
        except OSError:  # not an identity of this namespace
            os.setegid(0)
            continue
        try:
            open(os.__file__).close()
            reachable = True
        except OSError:
            reachable = False
        os.seteuid(0)
        os.setegid(0)
        if reachable:
            os.setresgid(identity, identity, identity)
            os.setresuid(identity, identity, identity)
        return


def _drop_capabilities() -> None:
    _call("capset", ctypes.byref(_CAPABILITIES), ctypes.byref((ctypes.c_uint32 * 6)()))
    _prctl(_SET_DUMPABLE, 0)  # no other process of the same user may look into this one


def _run(source: str, name: str) -> dict:
    """Run source as the module `name`; returns its names."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


def _be_program(task: dict) -> None:
    _run(task["source"], "__main__")


def _be_solution(task: dict, answer: int, ask: int) -> None:
    """Define the function, then answer calls until the checker has gone."""
    # under another name than __main__: code for use as a script stays out of the way, as in the original evaluation
    with open(answer, "w", encoding="ascii") as out, open(ask, encoding="ascii") as calls:

        def tell(answer) -> None:
            out.write(json.dumps(answer) + "\n")
            out.flush()

        try:
            names = _run(task["source"], "solution")
            if not callable(function := names.get(task["entry_point"])):
                raise NameError(f"no function {task['entry_point']} is defined")
        except Exception as error:
            _show(error)
            tell([None, json.loads(_report(error))])
            return
        tell([None, None])
        for line in calls:
            arguments, names = (_unpack(value) for value in json.loads(line))
            try:
                tell([_pack(function(*arguments, **names)), None])
            except Exception as error:
                _show(error)
                tell([None, json.loads(_report(error))])


class SolutionError(Exception):
    """In the checker: the solution raised an error (kind, text and errno are its own), or gave no answer."""

    def __init__(self, kind: str, text: str, number: int | None = None):
        super().__init__(f"{kind}: {text}")
        self.kind, self.text, self.number = kind, text, number


def _be_checker(task: dict, ask: int, answer: int) -> None:
    """Run the test against a stand-in that passes each call on."""
    with open(ask, "w", encoding="ascii") as calls, open(answer, encoding="ascii", errors="replace") as answers:

        def receive():
            try:
                value, error = json.loads(answers.readline())
                if error is None:
                    return value
                kind, text, number = error
            except (ValueError, TypeError):
                raise SolutionError("NoAnswer", "the solution ended, or wrote nonsense, when it was asked") from None
            raise SolutionError(str(kind), str(text), number)

        def candidate(*arguments, **names):
            try:
                calls.write(json.dumps([_pack(arguments), _pack(names)]) + "\n")
                calls.flush()
            except BrokenPipeError:
                raise SolutionError("NoAnswer", "the solution had ended before it was asked") from None
            return _unpack(receive())

        receive()  # that the function is defined
        _run(task["setup"], "checker")
        module = sys.modules["checker"].__dict__
        module[task["entry_point"]] = candidate
        exec(compile(task["test"], "<test>", "exec"), module)
        module["check"](candidate)


def _pack(value):
    """A value as JSON with its type. Subclasses travel as what they are derived from.

    Raises:
        TypeError: for a value of any other type.
    """
    from decimal import Decimal
    from fractions import Fraction

    if value is None or isinstance(value, bool):
        return value
    for kind, write in ((int, hex), (float, float.hex), (str, str.__str__), (bytes, bytes.hex), (Decimal, Decimal.__str__),
                        (Fraction, lambda v: f"{v.numerator}/{v.denominator}"),
                        (complex, lambda v: [v.real.hex(), v.imag.hex()])):
        if isinstance(value, kind):
            return [kind.__name__, write(value)]
    if isinstance(value, dict):
        return ["dict", [[_pack(key), _pack(item)] for key, item in dict.items(value)]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [_pack(item) for item in kind.__iter__(value)]]
    raise TypeError(f"a value of type {type(value).__name__} cannot be passed on")


def _unpack(packed):
    """The value `_pack` was given; what it makes are plain values of built-in types, whatever the message.

    Raises:
        SolutionError: not a message of `_pack`.
    """
    from decimal import Decimal
    from fractions import Fraction

    if packed is None or isinstance(packed, bool):
        return packed
    try:
        kind, content = packed
        if kind in ("list", "tuple", "set", "frozenset"):
            return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_unpack, content))
        if kind == "dict":
            return {_unpack(key): _unpack(item) for key, item in content}
        if kind == "complex":
            real, imaginary = map(float.fromhex, content)
            return complex(real, imaginary)
        return {"int": lambda v: int(v, 16), "float": float.fromhex, "str": str, "bytes": bytes.fromhex, "Decimal": Decimal,
                "Fraction": Fraction}[kind](content)
    except (ValueError, TypeError, KeyError, ArithmeticError):
        raise SolutionError("NoAnswer", "the solution wrote nonsense when it was asked") from None


def _main() -> None:
    try:
        result = _supervise(json.loads(sys.argv[1]))
    except OSError as error:
        result = {"setup": _told(error)}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    _main()
