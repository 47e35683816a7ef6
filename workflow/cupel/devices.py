"""GPUs of one machine, shared by jobs: each job claims memory on a device before CUDA starts, and waits for its turn.

The claims are kernel locks: one file that is never written to, in which a locked byte stands for `UNIT_MB` of one
device. What a process holds is gone with the process, however it ends, and nothing is left to clean up. Processes choose
one after the other, under a lock of their own that a waiting process keeps, so that a job which needs a whole device is
not passed by small ones for ever.

Inside the job of a cluster (`CLUSTERS`) the devices are the job's own: its claims are kept apart from those of other jobs, so
it never waits, while several processes of one allocation (grouped cells, or Snakemake inside `salloc`) still share its devices.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

UNIT_MB = 100
#: memory of a device above this is not counted, so that the bytes of two devices do not overlap
MOST_UNITS = 1 << 16
#: variables by which a cluster names the job that this process is part of
CLUSTERS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID")
#: seconds between two looks at the devices, and between two lines that say what is waited for
LOOK, SAY = 0.5, 300.0

_held: list = []


@dataclass(frozen=True)
class Device:
    """A GPU."""

    name: str  # as CUDA_VISIBLE_DEVICES wants it: the user's own word for it, else its UUID
    identity: str  # the same for every process of the machine, however the user calls the device
    memory_mb: int | None  # total memory; None where it is not known (a MIG slice)

    @property
    def units(self) -> int:
        """Locks that stand for all of its memory; one for a device of unknown size."""
        return 1 if self.memory_mb is None else min(max(self.memory_mb // UNIT_MB, 1), MOST_UNITS - 1)

    def need(self, vram_mb: int) -> int:
        """Locks that a claim takes: all of them for no number, or for one that is larger than the device."""
        return min(-(-vram_mb // UNIT_MB), self.units) if vram_mb > 0 else self.units


def installed() -> list[tuple[int, str, int]]:
    """Index, UUID and total memory (MB) of the NVIDIA devices of this machine; empty without a driver.

    It asks `nvidia-smi`, since asking CUDA would fix the choice of devices for this process.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    # a device that the driver has lost, or that reports no memory, has words where numbers should be
    return [(int(row[0]), row[1], int(row[2])) for row in rows if len(row) == 3 and row[0].isdigit() and row[2].isdigit()]


def visible() -> list[Device]:
    """The devices that this process may use: all, or those of CUDA_VISIBLE_DEVICES, read as CUDA reads it.

    The variable is a list of indices or (beginnings of) UUIDs; it ends at the first entry that is no device, so that ""
    and "-1" mean none.
    """
    found = installed()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return [Device(uuid, uuid, memory) for _, uuid, memory in found]
    devices = []
    for entry in (part.strip() for part in setting.split(",")):
        matches = [row for row in found if entry == str(row[0]) or (entry.startswith("GPU-") and row[1].startswith(entry))]
        if len(matches) == 1:
            devices.append(Device(entry, matches[0][1], matches[0][2]))
        elif entry.startswith("MIG-"):
            devices.append(Device(entry, entry, None))
        else:
            break
    return devices


def _offset(*names: str) -> int:
    """Where the bytes of something begin: far from those of anything else."""
    return int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:5], "big") * MOST_UNITS


def _lock_file() -> int:
    """Open the file of this user whose bytes are locked; nothing is ever written to it."""
    path = Path("/tmp") / f"cupel-devices-{os.getuid()}"  # not $TMPDIR, which two runs may have set differently
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _try(file: int, offset: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except (BlockingIOError, PermissionError):  # both mean that another process has it
        return False
    return True


def _release(file: int, offsets: list[int]) -> None:
    for offset in offsets:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, offset)


def _locks_hold(offset: int) -> bool:
    """Whether a child is refused what this process has locked: there are file systems on which every lock succeeds."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os._exit(int(_try(_lock_file(), offset)))
        os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 1


def claim(vram_mb: int = 0, count: int = 1) -> list[Device]:
    """Claim memory on devices for the rest of this process, and make them the only ones it sees.

    `vram_mb` is in MB of each; 0 means all of it, and so does more than it has. Of the devices with room the emptiest are
    taken, so that jobs spread before they share. A second call in the same process returns what it has. Must come before CUDA
    is used: CUDA_VISIBLE_DEVICES is set here, and read by CUDA once.

    Raises:
        ValueError: fewer devices than asked for, where there are any.
        RuntimeError: CUDA is already in use.
    """
    if _held:
        return list(_held[0][1])
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError("a GPU must be claimed before CUDA is used in this process")
    devices = visible()
    if not devices:
        return []
    if len(devices) < count:
        raise ValueError(f"{count} GPUs are asked for, this process sees {len(devices)}")
    # the cluster's name of the job that this process belongs to; empty on a machine of one's own
    allocation = next((f"{name}={os.environ[name]}" for name in CLUSTERS if os.environ.get(name)), "")
    file, began, said = _lock_file(), time.monotonic(), -SAY
    turn = _offset(allocation, "turn")
    if not _try(file, turn):
        print("waiting for a GPU: another job waits before this one", flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX, 1, turn)
    if not _locks_hold(turn):
        print("warning: the file system of /tmp grants a lock twice, so that jobs on one GPU do not know of each other and may "
              "run out of its memory; use --resources gpu=1", flush=True)
    while True:
        free = {}  # bytes that nobody else holds; this process holds them for the moment
        for device in devices:
            begin = _offset(allocation, device.identity)
            free[device] = [begin + unit for unit in range(1, device.units + 1) if _try(file, begin + unit)]
        fitting = [device for device in devices if len(free[device]) >= device.need(vram_mb)]
        fitting.sort(key=lambda device: -len(free[device]) / device.units)
        chosen = fitting[:count] if len(fitting) >= count else []
        for device in devices:
            _release(file, free[device][device.need(vram_mb) if device in chosen else 0 :])
        if chosen:
            break
        now = time.monotonic()
        if now - said >= SAY:
            room = ", ".join(f"{device.name} has {len(free[device]) * UNIT_MB} of {device.units * UNIT_MB} MB free"
                             for device in devices)
            wish = f"{vram_mb} MB" if vram_mb > 0 else "a whole device"
            print(f"waiting for a GPU: this job claims {wish}; {room}", flush=True)
            said = now
        time.sleep(LOOK)
    _release(file, [turn])
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(device.name for device in chosen)
    _held.append((file, chosen))  # the locks live as long as the file is open
    waited = time.monotonic() - began
    print(f"GPU {os.environ['CUDA_VISIBLE_DEVICES']}: {vram_mb or 'all'} MB claimed"
          + (f" after {waited:.0f} s" if waited >= 1 else ""), flush=True)
    return list(chosen)


def check(setting: str) -> str:
    """What is known of a wish (`auto`, `cpu`, `cuda`) before the first job: nothing, or that GPUs here will not be used.

    Raises:
        RuntimeError: `cuda` asked for where torch sees none.
    """
    found = visible() if setting != "cpu" else []
    if setting == "cpu" or (setting == "auto" and not found):
        return ""
    import torch

    if torch.cuda.is_available():
        return ""
    if setting == "cuda":
        raise RuntimeError(f"config.yaml: device: cuda is asked for, but torch {torch.__version__} sees no CUDA device; "
                           "use auto or cpu")
    return (f"torch {torch.__version__} cannot use the GPU of this machine ({found[0].name}): all is computed on the CPU. "
            "Install a build of torch for its driver, or say device: cpu")


def pick_device(setting: str, gpus: int = 1, vram_mb: int = 0) -> str:
    """`cpu` or `cuda` for a job, from the wish of the user (`auto`, `cpu` or `cuda`) and the number of its GPUs.

    Of each GPU `vram_mb` (in MB; 0: all) are claimed first. A job without GPUs computes on the CPU.

    Raises:
        RuntimeError: `cuda` asked for where torch sees none.
        ValueError: more GPUs than there are.
    """
    import torch

    if setting == "cpu" or not gpus:
        return "cpu"
    if torch.version.cuda:  # a build for CPUs needs no GPU, and one for other makers' has no nvidia-smi to ask
        claim(vram_mb, gpus)
    if torch.cuda.is_available():
        return "cuda"
    if setting == "cuda":
        raise RuntimeError("config.yaml: device: cuda is asked for, but torch sees no CUDA device; use auto or cpu")
    return "cpu"
