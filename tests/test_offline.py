"""docs/offline.md as it stands there: its commands carry a run to a machine without network, and it ends there the same."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cupel.images.datasets import load
from tests.conftest import REPOSITORY
from tests.test_workflow import TIMES, Folder, jobs

HERE, THERE = "Where there is a network", "Where there is none"
SETTINGS = {"scale": "smoke", "part": "1M", "python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def commands(heading: str, without: str = "", **settings: str) -> str:
    """The fenced blocks below a heading but for those with a word in them; settings in place of those printed there."""
    section = (REPOSITORY / "docs" / "offline.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    script = "\n".join(block for block in blocks if not without or without not in block)
    for name, value in {**SETTINGS, **settings}.items():
        script = re.sub(rf"^{name}=\S+", f"{name}='{value}'", script, flags=re.MULTILINE)
    return script


def bash(script: str, folder: Path, *prefix: str, path: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of a script that stops at the first error; `path` is where programs are looked for first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{path}{os.pathsep}{os.environ['PATH']}", **environment}
    done = subprocess.run([*prefix, "bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=3000, check=False)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def denied() -> tuple[str, ...]:
    """Beginning of a command that shall reach no network: without one, else told of a proxy that is not there."""
    for prefix in (("unshare", "-rn"), ("unshare", "-n"), ("bwrap", "--dev-bind", "/", "/", "--unshare-net")):
        if shutil.which(prefix[0]) and not subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
            return prefix
    return "env", "PIP_NO_INDEX=1", *(f"{name}_proxy=http://127.0.0.1:9" for name in ("http", "https", "all"))


@pytest.fixture
def home(tmp_path, cifar10) -> Folder:
    """The repository, under git, at scale smoke, with the first images of CIFAR-10 on another disk."""
    disk = tmp_path / "disk" / "images" / "cifar10"
    disk.mkdir(parents=True)
    shutil.copy(cifar10 / "manifest.json", disk)
    for split, size in (("train", 1500), ("test", 400)):
        part = load(cifar10, split)
        np.save(disk / f"{split}_images.npy", part.images[:size])
        np.save(disk / f"{split}_labels.npy", part.labels[:size])
    folder = Folder(tmp_path / "home", disk.parents[1])
    folder.set(papers=["fst"], data={"folder": "data", "mirror": "mirror"})
    (folder.path / "data").symlink_to(disk.parents[1])
    for name in ("pyproject.toml", "README.md", ".gitignore"):
        shutil.copy(REPOSITORY / name, folder.path)
    shutil.copytree(REPOSITORY / "envs", folder.path / "envs")
    subprocess.run("git init --quiet && git add .", shell=True, cwd=folder.path, check=True)
    return folder


def carry(home: Folder, away: Path) -> None:
    """Bring what was packed to the other machine, and take this one away."""
    away.mkdir()
    for file in [*home.path.glob("carry/*.tar*"), home.path / "carry" / "SHA256SUMS"]:
        shutil.move(file, away)
    shutil.rmtree(home.path)
    shutil.rmtree(home.data)


def test_a_run_is_carried_to_a_machine_without_network(home, denied, tmp_path):
    """Data, mirror and a trained victim travel in parts; only the defence is left to run, and gives the same numbers."""
    own = {"path": Path(sys.executable).parent, "PYTHONPATH": "workflow", "CUPEL_CACHE": str(tmp_path / "cache")}
    cell = "results/smoke/images/purified/cifar10/preactresnet18/fst/badnets@0.05/seed0/fst@heldout/metrics.json"
    code, output = home.run("--", cell)
    assert code == 0, output[-3000:]
    expected = json.loads((home.path / cell).read_text())
    shutil.rmtree((home.path / cell).parent)
    for name in ("mirror/triggers/own.png", "carry/wheels/any.whl", "carry/requirements.txt"):  # the wheels are the next test's
        (home.path / name).parent.mkdir(parents=True, exist_ok=True)
        (home.path / name).write_text(name)
    code, output = bash(commands(HERE, "pip", also="mirror results"), home.path, **own)
    assert code == 0 and "Nothing to be done" in output, output[-3000:]

    away = tmp_path / "away"
    carry(home, away)
    parts = sorted(away.glob("data.tar.*"))
    assert len(parts) > 3 and max(part.stat().st_size for part in parts) == 2**20
    script = commands(THERE, "pip", what=cell)
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    parts[2].rename(away / "late")
    code, output = bash(script, away, *denied, **own)
    assert code and "data.tar.001: FAILED" in output and "data.tar.002: FAILED open" in output and not (away / "cupel").exists()
    parts[1].write_bytes(whole)
    (away / "late").rename(parts[2])

    activate = away / "cupel" / ".venv" / "bin" / "activate"  # the environment of this test, in place of an installed one
    activate.parent.mkdir(parents=True)
    activate.touch()
    code, output = bash(script, away, *denied, **own)
    assert code == 0 and jobs(output) == {"purify": 1}, output[-3000:]
    found = json.loads((away / "cupel" / cell).read_text())
    assert found | dict.fromkeys(TIMES) == expected | dict.fromkeys(TIMES)
    assert (away / "cupel" / "mirror" / "triggers" / "own.png").is_file() and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_packages_are_carried(home, denied, tmp_path):
    """All wheels are downloaded for this Python, and installed where nothing but torch is there."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "tools"], check=True)
    bare = {"path": tmp_path / "tools" / "bin", "PYTHONPATH": ""}
    code, output = bash("python -m pip install --quiet uv", tmp_path, **bare)
    if code:
        pytest.skip(f"needs a package index: {output.strip().splitlines()[-1]}")
    code, output = bash(commands(HERE, "snakemake"), home.path, **bare)
    assert code == 0, output[-3000:]
    wheels = [file.name for file in (home.path / "carry" / "wheels").iterdir()]
    assert len(wheels) > 100 and all(name.endswith("-none-any.whl") or "manylinux" in name for name in wheels), wheels
    assert not [name for name in wheels if name.startswith(("torch-", "nvidia", "triton"))]

    carry(home, tmp_path / "away")
    machine = tmp_path / "machine"  # its own packages
    machine.mkdir()
    for path in Path(np.__file__).parents[1].iterdir():
        if re.match(r"(torch|torchvision|torchgen|functorch|triton|nvidia.*|cuda.*)(-.*info|\.libs)?$", path.name):
            (machine / path.name).symlink_to(path)
    code, output = bash(commands(THERE, what="data"), tmp_path / "away", *denied, **{**bare, "PYTHONPATH": str(machine)})
    assert code == 0 and "Nothing to be done" in output, output[-3000:]
