"""One run at a time in a folder of results, whoever starts it and from where; jobs that outlive a killed run are ended.

Snakemake's own lock files outlive a killed run and would ask the user to unlock; these locks are the kernel's and go with their
process (profiles/default says `nolock: true`).
"""

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

#: variable by which jobs know the file that they hold open while they work
JOBS = "CUPEL_JOBS"
_held: list[int] = []


def hold(results: str | Path, say: Callable[[str], None]) -> None:
    """Lock a folder of results for the rest of this process, and end what an earlier run left at work there.

    What the user should know of it is given to `say`.

    Raises:
        RuntimeError: another run is active there.
    """
    folder = Path(results).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _held.append(os.open(folder / ".cupel.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
    try:
        fcntl.flock(_held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"Another run is active in {folder}: wait for it, or set `results` to another folder.") from None
    except OSError as error:  # some network file systems know no locks
        say(f"no lock could be taken ({error}): do not start a second run in {folder}")
        return
    os.environ[JOBS] = str(folder / ".cupel.jobs")
    with open(os.environ[JOBS], "w") as jobs:
        if _taken(jobs.fileno()):
            here = holders(os.environ[JOBS])
            for pid in here:
                os.kill(pid, signal.SIGKILL)
            say("jobs of an earlier run, which was killed, are still at work: "
                + (f"those of this machine are ended ({', '.join(map(str, here))}), they will go on from their checkpoints"
                   if here else "waiting for them; they are on another machine or of another user"))
            fcntl.flock(jobs, fcntl.LOCK_EX)


def _taken(handle: int) -> bool:
    """Whether another process holds the lock on an open file; if not, this one has it, where the file system knows locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def prepare(folders: Iterable[str | Path]) -> None:
    """Lock folders of data that this run will prepare, for the rest of this process: several clones may share them.

    Raises:
        RuntimeError: another run prepares one of them, and each would remove what the other has made.
    """
    for folder in map(Path, folders):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _held.append(os.open(folder.parent / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
        if _taken(_held[-1]):
            raise RuntimeError(f"Another run is preparing {folder}: run the same command again when {folder}/manifest.json is "
                               "there.")


@contextlib.contextmanager
def alone(folder: str | Path) -> Iterator[None]:
    """In here no other process that asks writes to a folder, which is made.

    Raises:
        BlockingIOError: another does.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _taken(handle):
            raise BlockingIOError(f"another run writes to {folder}: wait for it, or write to another folder")
        yield
    finally:
        os.close(handle)


def holders(path: str | Path) -> list[int]:
    """Other processes of this machine that have a file open, so far as this user may see; none without /proc."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(path):
                found.add(int(link.parts[2]))
    return sorted(found - {os.getpid()})


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Let a later run know of this job; children that are forked count as well."""
    with contextlib.ExitStack() as stack:
        if path := os.environ.get(JOBS):
            with contextlib.suppress(OSError):
                fcntl.flock(stack.enter_context(open(path)), fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
