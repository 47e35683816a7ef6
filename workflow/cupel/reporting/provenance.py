"""What made a set of results: commit, versions, machine, seeds, data, time per rule."""

import contextlib
import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

from cupel.files import read_json


def git_commit(folder: str | Path) -> str:
    """Commit of the working tree, with `+changes` when files differ from it; `unknown` outside a repository."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Name of the CPU and number of cores."""
    import psutil

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next((line.partition(":")[2].strip() for line in info.read_text().splitlines()
                     if line.startswith("model name")), name)
    return f"{name}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB"


def without_folders(value):
    """A configuration with every absolute path cut to its last name: where a machine keeps things is nobody's result."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def provenance(root: str | Path, config: dict, data: str | Path, *, names: list[str], seeds: list[int]) -> dict:
    """One flat-ish record for `provenance.json`; paths of the machine are not in it."""
    config = without_folders(config)
    config_hash = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    manifests = {name: read_json(Path(data) / name / "manifest.json") for name in names}
    return {
        "commit": git_commit(root), "config": config, "config_sha256": config_hash, "versions": versions(),
        "processor": processor(), "seeds": seeds,
        "data": {name: {"content_sha256": m["content_sha256"], "source": m["source"]} for name, m in manifests.items()},
    }


def versions() -> dict[str, str]:
    """Versions of what results depend on, and the machine."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in ("cupel", "torch", "torchvision", "numpy", "scipy", "pandas", "scikit-learn", "matplotlib", "snakemake",
                 "transformers", "peft", "accelerate", "safetensors", "adversarial-robustness-toolbox"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        found["gpu"] = sys.modules["torch"].cuda.get_device_name()
    return found
