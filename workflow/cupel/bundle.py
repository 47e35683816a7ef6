"""A bundle: code, prepared data, weights and wheels in parts of a given largest size, for machines without network.

    make(...)             parts, manifest and the script that unpacks, verifies and runs (`bundle_unpack.py`)
    download_wheels(...)  the wheels of another machine's Python, at the versions of envs/constraints.txt

A part is a plain tar of at most a given size. A file that fits into a part lies in one whole; a larger one is cut into
numbered chunks. The manifest names size and sha256 of every part and every file; equal content makes an equal bundle.
"""

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from cupel import bundle_unpack
from cupel.bundle_unpack import BLOCK, CONFIG, FORMAT, check_path, manifest_digest, wheel_needs
from cupel.files import atomic, digest, write_json
from cupel.images.datasets import FILES

#: in the order in which they are packed
KINDS = ("source", "wheel", "data", "weights")
#: what a glibc of 2.28 (2018) runs; pip compares these names letter by letter
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)),
             "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")
#: files of a victim
VICTIM = ("metrics.json", "model.safetensors", "trigger.npz", "poison.npz", "history.csv")
#: what a run leaves in a repository, where no git says what is source
PRODUCED = ("data", "results", "logs", "benchmarks", "bundle", "build")


@dataclass(frozen=True)
class Entry:
    """A file to carry.

    Attributes:
        path: in the bundle, relative.
        source: on this machine.
        kind: one of `KINDS`.
    """

    path: str
    source: Path
    kind: str


@dataclass(frozen=True)
class Piece:
    """A file, or a chunk of it, as one member of a part.

    Attributes:
        entry: index of the file.
        member: name in the tar.
        offset, size: bytes of the file.
    """

    entry: int
    member: str
    offset: int
    size: int

    def header(self) -> bytes:
        info = tarfile.TarInfo(self.member)
        info.size, info.mode = self.size, 0o644
        return info.tobuf(tarfile.PAX_FORMAT)

    def room(self) -> int:
        """Bytes that it takes in a part."""
        return len(self.header()) + _padded(self.size)


END = 2 * tarfile.BLOCKSIZE  # zeros that end a tar


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def source_files(root: str | Path) -> list[str]:
    """Source files of a repository, relative paths, sorted.

    With git: the tracked files, and what is new and not ignored under workflow, since a run uses it. Without: all files
    but hidden ones and what runs produce.
    """
    root = Path(root)
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached"]
    try:
        if not (root / ".git").exists():
            raise FileNotFoundError
        listed = [subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout.split("\0")
                  for more in ([], ["--others", "--exclude-standard", "--", "workflow"])]
        found = {path for paths in listed for path in paths}
    except (OSError, subprocess.CalledProcessError):
        found = set()
        for folder, folders, names in os.walk(root):
            here = Path(folder).relative_to(root)
            folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"
                          and not name.endswith(".egg-info") and not (here == Path() and name in PRODUCED)]
            found |= {(here / name).as_posix() for name in names if name[0] != "."}
    # a link may lead anywhere; a file may be deleted and still be tracked
    return sorted(path for path in found if (root / path).is_file() and not (root / path).is_symlink())


def source_digest(root: str | Path) -> str:
    """Hash of all source files, paths and content."""
    sha = hashlib.sha256()
    for path in source_files(root):
        sha.update(f"{path}\0{digest(Path(root) / path)}\0".encode())
    return sha.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- what is carried


def data_files(names: Iterable[str], folder: str) -> dict[str, str]:
    """Files of prepared data sets, by their path in the bundle."""
    return {f"data/{name}/{file}": f"{folder}/{name}/{file}" for name in names for file in FILES}


def mirror_files(parameters: Iterable[dict], mirror: str | None) -> dict[str, str]:
    """Files of the user's mirror that attacks name in their parameters, by their path in the bundle."""
    values = {value for settings in parameters for value in settings.values() if isinstance(value, str)} if mirror else ()
    return {f"mirror/{Path(value).relative_to(mirror).as_posix()}": value for value in sorted(values)
            if Path(value).is_relative_to(mirror)}


def victim_files(results: str | Path, scale: str) -> dict[str, str]:
    """The victims of a scale that are there, each whole, and the triggers made for them, by their path in the bundle."""
    base = Path(results, scale)
    files = list(base.glob("triggers/**/trigger.npz"))
    for metrics in base.glob("victims/**/metrics.json"):
        victim = [metrics.with_name(name) for name in VICTIM]
        files += victim if all(path.is_file() for path in victim) else []
    return {f"results/{path.relative_to(results).as_posix()}": str(path) for path in sorted(files)}


def carried_config(config: dict, mirrored: bool) -> dict:
    """The configuration of a run with the folders of the bundle in place of those of this machine."""
    data = {**config["data"], "folder": "data", "mirror": "mirror" if mirrored else None, "cache": None}
    plugins = [f"plugins/{Path(path).name}" for path in config["plugins"]]
    return {**config, "data": data, "results": "results", "plugins": plugins}


# ------------------------------------------------------------------------------------------------------------------ packing


def plan(entries: Sequence[Entry], part_bytes: int) -> list[list[Piece]]:
    """Which piece goes into which part: first fit, in the order of the entries.

    Raises:
        ValueError: parts are too small to hold anything, or two members would have one name.
    """
    pieces = []
    for index, entry in enumerate(entries):
        size = entry.source.stat().st_size
        whole = Piece(index, entry.path, 0, size)
        if whole.room() + END <= part_bytes:
            pieces.append(whole)
            continue
        name = entry.path + ".chunk-{:04d}"
        header = len(Piece(index, name.format(0), 0, part_bytes).header())
        step = (part_bytes - END - header) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        if step <= 0:
            raise ValueError(f"parts of {part_bytes} bytes cannot hold a piece of {entry.path}: {header + END} bytes of each "
                             "are headers; choose larger parts (bundle.part_mb)")
        pieces += [Piece(index, name.format(k), start, min(step, size - start))
                   for k, start in enumerate(range(0, size, step))]
    members = [piece.member for piece in pieces]
    if len(set(members)) < len(members):
        double = next(name for name in members if members.count(name) > 1)
        raise ValueError(f"two files of the bundle would be called {double}: rename one")
    parts, free = [], []
    for piece in pieces:
        room = piece.room()
        number = next((k for k, left in enumerate(free) if room <= left), None)
        if number is None:
            number = len(parts)
            parts.append([])
            free.append(part_bytes - END)
        parts[number].append(piece)
        free[number] -= room
    return parts


def write_part(path: Path, pieces: Sequence[Piece], entries: Sequence[Entry]) -> str:
    """Write a tar of the pieces, atomically, block by block.

    Returns:
        Its sha256.

    Raises:
        RuntimeError: a file became shorter while it was read.
    """
    sha = hashlib.sha256()
    with atomic(path) as temporary, open(temporary, "wb") as out:
        def put(data: bytes) -> None:
            sha.update(data)
            out.write(data)

        for piece in pieces:
            put(piece.header())
            left = piece.size
            with open(entries[piece.entry].source, "rb") as file:
                file.seek(piece.offset)
                while left:
                    data = file.read(min(BLOCK, left))
                    if not data:
                        raise RuntimeError(f"{entries[piece.entry].source} became shorter while it was packed")
                    put(data)
                    left -= len(data)
            put(bytes(_padded(piece.size) - piece.size))
        put(bytes(END))
    return sha.hexdigest()


def _orders(entries: Sequence[Entry]) -> list[int]:
    """Seconds by which the files are to differ in age where they are unpacked.

    Snakemake runs a job again when an input or its script is younger than its output. Nothing that is carried is to be run
    again: sources are the oldest, then data, then weights, these in the order in which they were made.
    """
    ages = sorted({entry.source.stat().st_mtime_ns for entry in entries if entry.kind == "weights"})
    rank = {age: 2 + k for k, age in enumerate(ages)}
    return [rank[entry.source.stat().st_mtime_ns] if entry.kind == "weights" else int(entry.kind == "data")
            for entry in entries]


def make(folder: str | Path, *, root: str | Path, scale: str, config: dict, carried: Iterable[Entry] = (),
         wheels: Iterable[str | Path] = (), part_bytes: int = 60 << 20, facts: dict | None = None) -> dict:
    """Write a bundle: `part-000.tar`, ..., `unpack.py` and, last, `manifest.json`.

    Args:
        folder: of the bundle; parts of an earlier one in it are removed.
        root: the repository.
        scale: that is run on the other machine.
        config: the whole configuration there.
        carried: data and weights.
        wheels: files.
        part_bytes: largest size of a part.
        facts: more entries of the manifest (commit, versions, ...).

    Returns:
        The manifest.

    Raises:
        ValueError: a path leads out of the bundle, is there twice, or parts are too small.
    """
    folder, root = Path(folder), Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [folder / "manifest.json", *folder.glob("part-*.tar")]:
        old.unlink(missing_ok=True)
    with (root / "pyproject.toml").open("rb") as file:
        requirements = tomllib.load(file)["project"]["dependencies"]
    settings = folder / f".{CONFIG}"
    settings.write_text(yaml.safe_dump(config), encoding="utf-8")
    try:
        entries = [Entry(path, root / path, "source") for path in source_files(root)]
        entries += [Entry(CONFIG, settings, "source"), *carried]
        entries += [Entry(f"wheels/{Path(wheel).name}", Path(wheel), "wheel") for wheel in wheels]
        entries.sort(key=lambda entry: (KINDS.index(entry.kind), entry.path))
        paths = [check(entry.path) for entry in entries]
        if len(set(paths)) < len(paths):
            raise ValueError(f"{next(path for path in paths if paths.count(path) > 1)} would be twice in the bundle")
        layout = plan(entries, part_bytes)
        files = [{"path": entry.path, "kind": entry.kind, "size": entry.source.stat().st_size,
                  "sha256": digest(entry.source), "order": order, "chunks": [],
                  "executable": entry.kind == "source" and os.access(entry.source, os.X_OK)}
                 for entry, order in zip(entries, _orders(entries), strict=True)]
        parts = []
        for number, pieces in enumerate(layout):
            path = folder / f"part-{number:03d}.tar"
            sha = write_part(path, pieces, entries)
            parts.append({"name": path.name, "size": path.stat().st_size, "sha256": sha})
            for piece in pieces:
                files[piece.entry]["chunks"].append(
                    {"part": number, "member": piece.member, "offset": piece.offset, "size": piece.size})
    finally:
        settings.unlink()
    for file in files:
        file["chunks"].sort(key=lambda chunk: chunk["offset"])
    with atomic(folder / "unpack.py") as temporary:
        shutil.copyfile(bundle_unpack.__file__, temporary)
    manifest = {**(facts or {}), "format": FORMAT, "scale": scale, "requirements": requirements, "part_bytes": part_bytes,
                "parts": parts, "files": files}
    manifest["sha256"] = manifest_digest(manifest)
    write_json(folder / "manifest.json", manifest)
    return manifest


def check(path: str) -> str:
    """A path in the bundle, refused here if the other machine would refuse it."""
    try:
        return check_path(path)
    except bundle_unpack.Problem as problem:
        raise ValueError(str(problem)) from None


# ------------------------------------------------------------------------------------------------------------------- wheels


def target_environment(python: str) -> dict[str, str]:
    """Values of environment markers for CPython `python` ("3.12" or "3.12.4") on Linux, x86_64."""
    full = python if python.count(".") == 2 else f"{python}.0"
    return {**default_environment(), "python_version": ".".join(full.split(".")[:2]), "python_full_version": full,
            "implementation_version": full, "implementation_name": "cpython", "platform_python_implementation": "CPython",
            "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64",
            "platform_release": "", "platform_version": "", "extra": ""}


def read_pins(constraints: str | Path, environment: dict[str, str]) -> dict[str, str]:
    """Version of every package in a constraints file that applies in an environment, by canonical name.

    Raises:
        ValueError: a line is no pin, or two that apply differ.
    """
    pins = {}
    for line in Path(constraints).read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        name, pin = canonicalize_name(requirement.name), str(requirement.specifier).removeprefix("==")
        if str(requirement.specifier) != f"=={pin}" or pins.get(name, pin) != pin:
            raise ValueError(f"{constraints}: {line}: expected one line name==version that applies")
        pins[name] = pin
    return pins


def needed(requirements: Iterable[str], extras: Iterable[str], environment: dict[str, str]) -> list[tuple[str, str]]:
    """(canonical name, extra) of the requirements that apply; the extra is empty for the package itself."""
    found = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)):
            name = canonicalize_name(requirement.name)
            found += [(name, ""), *((name, extra) for extra in sorted(requirement.extras))]
    return found


def download_wheels(folder: str | Path, *, pyproject: str | Path, constraints: str | Path, python: str,
                    platforms: Sequence[str], skip: Sequence[str]) -> list[Path]:
    """Fetch the wheels that the project needs on another machine: Linux, x86_64, glibc 2.28 or newer.

    The dependencies of pyproject.toml are followed through the metadata of the wheels themselves. Every version is the one
    that the constraints pin for that Python, so pip resolves nothing. What `skip` names is neither fetched nor followed.

    Args:
        folder: where to put them; wheels in it that are not needed are removed.
        pyproject, constraints: files.
        python: version of the other machine's CPython.
        platforms: more platform tags, for a newer glibc (`manylinux_2_34_x86_64`).
        skip: patterns of canonical names.

    Returns:
        The wheels, sorted.

    Raises:
        ValueError: a package is not pinned.
        RuntimeError: there is no such wheel; the text holds what pip says.
    """
    folder, environment = Path(folder), target_environment(python)
    folder.mkdir(parents=True, exist_ok=True)
    pins = read_pins(constraints, environment)
    with open(pyproject, "rb") as file:
        level = needed(tomllib.load(file)["project"]["dependencies"], (), environment)
    seen, wheels = set(), {}
    while level:
        level = [item for item in dict.fromkeys(level)
                 if item not in seen and not any(fnmatch.fnmatch(item[0], pattern) for pattern in skip)]
        seen |= set(level)
        fresh = sorted({name for name, _ in level} - set(wheels))
        unpinned = [name for name in fresh if name not in pins]
        if unpinned:
            raise ValueError(f"{constraints} pins no version for Python {python} of: {', '.join(unpinned)}")
        if fresh:
            _fetch(folder, [f"{name}=={pins[name]}" for name in fresh], python, platforms)
            for path in sorted(folder.glob("*.whl")):
                name, version, _, _ = parse_wheel_filename(path.name)
                if name in fresh and version == Version(pins[name]):
                    wheels[name] = path
        level = [item for name, extra in level for item in needed(wheel_needs(wheels[name]), (extra,), environment)]
    for path in set(folder.glob("*.whl")) - set(wheels.values()):
        path.unlink()
    return sorted(wheels.values())


def _pip(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _fetch(folder: Path, pins: Sequence[str], python: str, platforms: Sequence[str]) -> None:
    """Wheels of exact versions; what is published as source alone is built here, if that makes a wheel for any machine."""
    tags = [option for tag in dict.fromkeys((*PLATFORMS, *platforms)) for option in ("--platform", tag)]
    todo = list(pins)
    while todo:
        done = _pip("download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp",
                    "--python-version", python, *tags, "--dest", str(folder), *todo)
        if not done.returncode:
            return
        absent = re.search(r"No matching distribution found for (\S+)", done.stderr)
        if absent is None or absent[1] not in todo:
            raise RuntimeError(f"pip could not download {', '.join(todo)}: {done.stderr.strip()}")
        _build(folder, absent[1], python)
        todo.remove(absent[1])


def _build(folder: Path, pin: str, python: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        done = _pip("wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, pin)
        made = list(Path(scratch).glob("*.whl"))
        if done.returncode or not made or not made[0].name.endswith("-none-any.whl"):
            raise RuntimeError(f"{pin} has no wheel for Python {python} and {PLATFORMS[0]} or older (a newer glibc: "
                               f"bundle.platforms), and none for any machine can be built: {done.stderr.strip()}")
        shutil.move(made[0], folder / made[0].name)
