"""A real SLURM of one node on the loopback interface, with two pretend GPUs: munged, slurmctld and slurmd.

Needs root and the packages slurm-wlm and munge. SLURM reads its configuration in /etc/slurm only (a job does not see
another SLURM_CONF), so two files are written there and taken away again; munge gets a key and a socket of its own, and
/etc/munge is not touched.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

CONFIGURATION = Path("/etc/slurm")
FOLDER = Path("/run/cupel_slurm")  # fixed, so that what a killed test run left behind is found and ended
MARK = "# written by cupel's tests/slurm.py"
DAEMONS = ("slurmd", "slurmctld", "munged")  # in the order in which they are stopped

SLURM_CONF = """{mark}
ClusterName=cupel
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
ReturnToService=2
MinJobAge=3600
KillWait=2
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 Gres=gpu:pretend:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP
PartitionName=accelerated Nodes={host} MaxTime=60 State=UP
"""

# two devices that every machine has stand for GPUs: they are allocated and counted, never used
GRES_CONF = """{mark}
Name=gpu Type=pretend File=/dev/null
Name=gpu Type=pretend File=/dev/zero
"""


def reason_to_skip() -> str:
    """Why there can be no SLURM on this machine; empty if there can."""
    missing = [name for name in (*DAEMONS, "sbatch", "squeue") if shutil.which(name, path=_path()) is None]
    if missing:
        return f"needs the packages slurm-wlm and munge: no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs as their user, and its configuration is in /etc/slurm"
    for name in ("slurm.conf", "gres.conf"):
        file = CONFIGURATION / name
        if file.exists() and not _ours(file):
            return f"this machine has a SLURM of its own: {file}"
    return ""


def _ours(file: Path) -> bool:
    return file.exists() and file.read_text().startswith(MARK)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _stop_daemon(name: str) -> None:
    """End the daemon of our pid file, if that number is still its own."""
    try:
        pid = int((FOLDER / f"{name}.pid").read_text())
        if Path(f"/proc/{pid}/exe").resolve().name != Path(shutil.which(name, path=_path())).resolve().name:
            return
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):  # no such file, no such process
        return
    for _ in range(100):
        # a daemon whose parent does not wait for it stays behind as a zombie, which is ended as well
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


def _end_orphans() -> None:
    """End processes of our jobs that outlived them: without cgroups slurmd loses sight of a process whose parent has died."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # no process, or no more
            if folder.name.isdigit() and b"SLURM_CLUSTER_NAME=cupel\0" in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def tool(*command: str) -> str:
    """Output of a SLURM command."""
    return subprocess.run(command, env={**os.environ, "PATH": _path()}, check=True, capture_output=True, text=True).stdout


def start() -> None:
    """Write the configuration and start the three daemons; back when the node is idle.

    Raises:
        RuntimeError: the node was not idle within 20 s; the text holds the end of the logs.
    """
    stop()
    FOLDER.mkdir(mode=0o755)
    for name in ("state", "spool"):
        (FOLDER / name).mkdir()
    key = FOLDER / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    controller_port, node_port = _free_ports(2)
    CONFIGURATION.mkdir(exist_ok=True)
    names = {"mark": MARK, "host": socket.gethostname().partition(".")[0], "folder": FOLDER,
             "controller_port": controller_port, "node_port": node_port}
    (CONFIGURATION / "slurm.conf").write_text(SLURM_CONF.format(**names))
    (CONFIGURATION / "gres.conf").write_text(GRES_CONF.format(**names))
    tool("munged", "--force", f"--socket={FOLDER}/munge.socket", f"--key-file={key}", f"--pid-file={FOLDER}/munged.pid",
         f"--log-file={FOLDER}/munged.log", f"--seed-file={FOLDER}/munged.seed")
    tool("slurmctld", "-f", str(CONFIGURATION / "slurm.conf"))
    tool("slurmd", "-f", str(CONFIGURATION / "slurm.conf"))
    for _ in range(200):
        with contextlib.suppress(subprocess.CalledProcessError):
            if set(tool("sinfo", "--noheader", "--format=%T").split()) == {"idle"}:
                return
        time.sleep(0.1)
    logs = "\n".join(file.read_text()[-2000:] for file in sorted(FOLDER.glob("*.log")))
    raise RuntimeError(f"the SLURM node is not idle after 20 s\n{logs}")


def stop() -> None:
    """Cancel what runs, end the daemons and take the configuration away; nothing happens where there is none."""
    if _ours(CONFIGURATION / "slurm.conf") and (FOLDER / "slurmctld.pid").exists():  # never on the user's own cluster
        with contextlib.suppress(subprocess.SubprocessError):
            tool("scancel", "--user=root")
            time.sleep(0.5)
    for name in DAEMONS:
        _stop_daemon(name)
    _end_orphans()
    for name in ("slurm.conf", "gres.conf"):
        file = CONFIGURATION / name
        if _ours(file):
            file.unlink()
    shutil.rmtree(FOLDER, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    """A running cluster of one node, 2 cores and 2 pretend GPUs; stopped afterwards."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    try:
        start()
        yield tool
    finally:
        stop()
