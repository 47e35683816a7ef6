"""Unpack, verify and run a bundle where there is no network. Copied into every bundle as `unpack.py`.

    python unpack.py                      verify the parts that are here and unpack them; again as more arrive
    python unpack.py --install            then install the wheels for which this Python has nothing that serves
    python unpack.py --run -- -n          then run Snakemake, offline, with the configuration of the bundle

The standard library of Python 3.11 is all it needs; `--install` also needs pip. Exit codes: 0 done, 1 a setting or a file
is wrong, 2 parts are missing or damaged, 3 packages are missing; with --run the exit code of Snakemake.
"""

from __future__ import annotations  # so that an older Python gets as far as saying that it is too old

import argparse
import contextlib
import email.parser
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

FORMAT = "cupel.bundle/1"
STATE = ".bundle"  # folder, in the unpacked repository, of what this script must remember
CONFIG = "bundle-config.yaml"
BLOCK = 1 << 20


class Problem(Exception):
    """What is wrong and what would be right; `code` is the exit code."""

    def __init__(self, text: str, code: int = 1):
        super().__init__(text)
        self.code = code


def digest(path: Path) -> str:
    """sha256 of a file, hex, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: dict) -> str:
    """sha256 of a manifest without its own entry `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_path(path: str) -> str:
    """The path, if it is relative, normal, and leads into the folder it is joined to.

    Raises:
        Problem: anything else; also the folder in which this script keeps its state.
    """
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or {"..", "/"} & set(parts) or parts[0] == STATE or set(path) & set("\\:\0"):
        raise Problem(f"path {path!r} in the bundle is refused: it must be relative and stay inside the folder")
    return path


def read_manifest(folder: Path) -> dict:
    """The manifest of a bundle, checked against its own checksum.

    Raises:
        Problem: missing, damaged, of another format, or with paths that lead elsewhere.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest_digest(manifest)
    except FileNotFoundError:
        raise Problem(f"{path}: no such file; manifest.json must lie beside the parts", 2) from None
    except (ValueError, AttributeError):
        raise Problem(f"{path} is damaged: not a JSON object; copy it again", 2) from None
    if manifest.get("format") != FORMAT:
        raise Problem(f"{path}: format is {manifest.get('format')!r}, this script reads {FORMAT!r}")
    if manifest.get("sha256") != found:
        raise Problem(f"{path} is damaged: its sha256 is {found}, it says {manifest.get('sha256')}; copy it again", 2)
    paths = [check_path(file["path"]) for file in manifest["files"]]
    if len(set(paths)) < len(paths):
        raise Problem(f"{path}: a file is listed twice")
    if any(PurePosixPath(part["name"]).name != part["name"] for part in manifest["parts"]):
        raise Problem(f"{path}: the name of a part is a path")
    return manifest


# ---------------------------------------------------------------------------------------------------------------- unpacking


class Unpacker:
    """Brings a folder, step by step and repeatably, to what a manifest says.

    A file that lies in one part is written beside its place and renamed. A file in chunks grows in the state folder, each
    chunk at its offset, and moves to its place once it is whole; nothing is held in memory, no chunk is stored twice.

    Args:
        manifest: see `read_manifest`.
        parts: folder of the parts.
        into: the repository to be; may exist.
    """

    def __init__(self, manifest: dict, parts: Path, into: Path):
        self.manifest, self.parts, self.into = manifest, parts, into
        self.state = into / STATE
        self.settled: dict[str, bool] = {}
        self.kept: list[str] = []
        self.written = 0
        names = [part["name"] for part in manifest["parts"]]
        self.members = {name: {} for name in names}  # part -> member -> (file, number of its chunk)
        for file in manifest["files"]:
            for number, chunk in enumerate(file["chunks"]):
                self.members[names[chunk["part"]]][chunk["member"]] = (file, number)

    def run(self) -> tuple[list[str], list[str]]:
        """Unpack every part that is here and needed.

        Returns:
            What is missing and what is damaged, one sentence each.

        Raises:
            Problem: a part holds what it must not.
        """
        self.state.mkdir(parents=True, exist_ok=True)
        clock = self.state / "time"
        if not clock.exists():
            # all times lie in the past, sources before data before results: nothing looks out of date to Snakemake
            clock.write_text(str(int(time.time()) - 86400))
        self.base = int(clock.read_text())
        missing, damaged = [], []
        for part in self.manifest["parts"]:
            if not any(self.wanted(file, number) for file, number in self.members[part["name"]].values()):
                continue
            path = self.parts / part["name"]
            if not path.is_file():
                missing.append(f"{part['name']} is missing ({part['size']} bytes, sha256 {part['sha256']})")
            elif path.stat().st_size != part["size"]:
                damaged.append(f"{part['name']} is damaged: {path.stat().st_size} bytes instead of {part['size']}")
            elif (found := digest(path)) != part["sha256"]:
                damaged.append(f"{part['name']} is damaged: its sha256 is {found} instead of {part['sha256']}")
            else:
                self.extract(part, path)
        return missing, damaged

    def wanted(self, file: dict, number: int) -> bool:
        return not self.settle(file) and not self.mark(file, number).exists()

    def growing(self, file: dict) -> Path:
        name = hashlib.sha256(f"{file['path']} {file['sha256']}".encode()).hexdigest()
        return self.state / f"{name[:32]}.partial"

    def mark(self, file: dict, number: int) -> Path:
        return self.growing(file).with_suffix(f".{number}.done")

    def part_mark(self, part: dict) -> Path:
        return self.state / f"{part['sha256']}.part"

    def settle(self, file: dict) -> bool:
        """Whether a file is in its place: the very file, or a source file that was edited after it was unpacked."""
        path = file["path"]
        if path not in self.settled:
            place = self.into / path
            good = place.is_file() and place.stat().st_size == file["size"] and digest(place) == file["sha256"]
            parts = [self.manifest["parts"][chunk["part"]] for chunk in file["chunks"]]
            if not good and place.is_file() and file["kind"] == "source":
                good = all(self.part_mark(part).exists() for part in parts)
                if good:
                    self.kept.append(path)
            self.settled[path] = good
        return self.settled[path]

    def place(self, file: dict) -> Path:
        """Where a file goes; its folder is made.

        Raises:
            Problem: a link on this machine leads the path out of the folder.
        """
        place = self.into / file["path"]
        if not place.parent.resolve().is_relative_to(self.into.resolve()):
            raise Problem(f"{place.parent} leads out of {self.into} through a link: refused")
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def extract(self, part: dict, path: Path) -> None:
        expected = self.members[part["name"]]
        try:
            tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below; all headers are read here and in getmembers
            tar.getmembers()
        except tarfile.TarError as error:
            raise Problem(f"{part['name']}: not a whole tar archive, although its sha256 is right ({error}): refused") from None
        with tar:
            for info in tar.getmembers():  # headers only; nothing is written before all are checked
                if not info.isreg():
                    raise Problem(f"{part['name']}: member {info.name!r} is no regular file (a link or device): refused")
                if info.name not in expected:
                    raise Problem(f"{part['name']}: member {info.name!r} is not in the manifest: refused")
                file, number = expected[info.name]
                if info.size != file["chunks"][number]["size"]:
                    raise Problem(f"{part['name']}: member {info.name!r} has {info.size} bytes, not what the manifest says")
            lacking = set(expected) - set(tar.getnames())
            if lacking:
                raise Problem(f"{part['name']}: member {min(lacking)!r} is in the manifest and not in the part")
            for info in tar.getmembers():
                file, number = expected[info.name]
                if self.wanted(file, number):
                    write = self.write if len(file["chunks"]) == 1 else self.add_chunk
                    write(tar.extractfile(info), file, number)
        self.part_mark(part).touch()

    def write(self, source, file: dict, number: int) -> None:
        temporary = self.growing(file)
        with open(temporary, "wb") as out:
            shutil.copyfileobj(source, out, BLOCK)
            out.flush()
            os.fsync(out.fileno())
        self.finish(file, temporary)

    def add_chunk(self, source, file: dict, number: int) -> None:
        growing = self.growing(file)
        with open(growing, "r+b" if growing.exists() else "w+b") as out:
            out.seek(file["chunks"][number]["offset"])
            shutil.copyfileobj(source, out, BLOCK)
            out.flush()
            os.fsync(out.fileno())
        self.mark(file, number).touch()
        marks = [self.mark(file, k) for k in range(len(file["chunks"]))]
        if all(mark.exists() for mark in marks):
            for mark in marks:  # joined now; or wrong although its parts are right, and to be written anew
                mark.unlink()
            self.finish(file, growing)

    def finish(self, file: dict, temporary: Path) -> None:
        """Check a file that is whole and move it to its place."""
        found = digest(temporary)
        if found != file["sha256"]:
            temporary.unlink()
            raise Problem(f"{file['path']}: what was written has sha256 {found} instead of {file['sha256']}; the disk is "
                          "at fault, or the manifest does not belong to these parts")
        if file["executable"]:
            temporary.chmod(temporary.stat().st_mode | 0o111)
        moment = self.base + file["order"]
        os.utime(temporary, (moment, moment))
        os.replace(temporary, self.place(file))
        self.settled[file["path"]] = True
        self.written += 1


# ----------------------------------------------------------------------------------------------------------------- packages


def load_packaging(wheels: list[Path]) -> SimpleNamespace:
    """What is needed of `packaging`: the machine's, else pip's own copy, else the wheel in the bundle.

    Raises:
        Problem: none of them is there.
    """
    def of(root: str) -> SimpleNamespace:
        module = {name: importlib.import_module(f"{root}.{name}") for name in ("requirements", "utils", "tags", "version")}
        return SimpleNamespace(Requirement=module["requirements"].Requirement, Version=module["version"].Version,
                               canonical=module["utils"].canonicalize_name, tags=module["tags"].sys_tags,
                               parse_wheel=module["utils"].parse_wheel_filename)

    for root in ("packaging", "pip._vendor.packaging"):
        with contextlib.suppress(ImportError, AttributeError):  # absent, or older than 20.9
            return of(root)
    for wheel in wheels:
        if wheel.name.startswith("packaging-"):
            sys.path.insert(0, str(wheel))
            for name in [name for name in sys.modules if name.partition(".")[0] == "packaging"]:
                del sys.modules[name]
            return of("packaging")
    raise Problem(f"{sys.executable} has neither packaging nor pip: install one (python -m ensurepip works offline)", 3)


def wheel_needs(wheel: Path) -> list[str]:
    """`Requires-Dist` of a wheel."""
    with zipfile.ZipFile(wheel) as pack:
        name = next(name for name in pack.namelist() if name.count("/") == 1 and name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(pack.read(name).decode("utf-8", "replace")).get_all("Requires-Dist") or []


def installed(paths: list[str], tools: SimpleNamespace) -> dict[str, SimpleNamespace]:
    """Distributions on a search path by canonical name, the first of each: version, needs."""
    found = {}
    for entry in importlib.metadata.distributions(path=paths):
        try:
            name, version, needs = entry.metadata["Name"], entry.metadata["Version"], entry.requires or []
        except (TypeError, AttributeError, OSError):  # what a broken installation left behind
            continue
        if name and version:
            found.setdefault(tools.canonical(name), SimpleNamespace(version=version, needs=needs, wheel=None))
    return found


def bundled(wheels: list[Path], tools: SimpleNamespace) -> tuple[dict[str, SimpleNamespace], dict[str, str]]:
    """Wheels that fit this Python by canonical name, and those that do not with the reason."""
    fitting, unfit = {}, {}
    here = set(tools.tags())
    for wheel in wheels:
        name, version, _, tags = tools.parse_wheel(wheel.name)
        if here & tags:
            fitting[name] = SimpleNamespace(version=str(version), needs=wheel_needs(wheel), wheel=wheel)
        else:
            unfit[name] = (f"{wheel.name} does not fit Python {sys.version_info[0]}.{sys.version_info[1]} on this machine; "
                           "make the bundle with the right bundle.python or bundle.platforms")
    return fitting, unfit


def serves(version: str, requirement, tools: SimpleNamespace) -> bool:
    try:
        return requirement.specifier.contains(tools.Version(version), prereleases=True)
    except ValueError:  # a version that is none
        return False


def reach(requirements: list[str], take, tools: SimpleNamespace) -> tuple[dict, dict]:
    """Follow requirements from the project through what is taken.

    Args:
        requirements: of the project.
        take: function from a canonical name to what is taken for it (with `needs`), or None.

    Returns:
        What is taken for every name, and per name the list of (requirement, who asks for it).
    """
    taken, asked, followed = {}, {}, set()
    todo = [(text, "cupel", "") for text in requirements]
    while todo:
        text, by, extra = todo.pop(0)
        try:
            requirement = tools.Requirement(text)
        except ValueError:  # old packages of the machine state needs in forms that are none any more
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = tools.canonical(requirement.name)
        asked.setdefault(name, []).append((requirement, by))
        taken[name] = take(name)
        for wanted in ("", *sorted(requirement.extras)):
            if taken[name] is not None and (name, wanted) not in followed:
                followed.add((name, wanted))
                todo += [(text, name, wanted) for text in taken[name].needs]
    return taken, asked


def foreign(name: str, taken: dict) -> bool:
    """Whether a package in use is the machine's own."""
    return name != "cupel" and taken[name].wheel is None


def unserved(taken: dict, asked: dict, tools: SimpleNamespace) -> list[tuple]:
    """(name, requirement, who asks) where nothing is taken or the version does not serve."""
    return [(name, requirement, by) for name, edges in sorted(asked.items()) for requirement, by in edges
            if taken[name] is None or not serves(taken[name].version, requirement, tools)]


def choose(requirements: list[str], own: dict, wheels: dict, tools: SimpleNamespace) -> tuple[dict, dict, list[str], list[str]]:
    """For every package that is needed: this machine's own, or the wheel of the bundle.

    The machine's own is taken wherever its version serves the project and all wheels that are taken. It gives way to its
    wheel when it does not, and when it cannot work with a wheel that is taken. A package only ever changes in that
    direction, so this ends. How the machine's packages suit each other is the machine's affair.

    Args:
        requirements: of the project, as in pyproject.toml.
        own: `installed`.
        wheels: `bundled`.

    Returns:
        What is taken for each name (None: nothing is there), who asks for what, what is missing (one sentence each), and
        what may not fit together on this machine without concern to the bundle.
    """
    given_up: set[str] = set()
    while True:
        def take(name: str, given_up=frozenset(given_up)):
            return own[name] if name in own and name not in given_up else wheels.get(name)

        taken, asked = reach(requirements, take, tools)
        worse = set()
        for name, _, by in unserved(taken, asked, tools):
            if foreign(by, taken):  # it cannot work with a wheel that others need
                worse |= {by} & set(wheels) if taken[name] is not None and taken[name].wheel else set()
            else:  # the machine's version does not serve
                worse |= {name} & set(wheels)
        if not worse - given_up:
            break
        given_up |= worse
    missing, notes = [], []
    for name, requirement, by in unserved(taken, asked, tools):
        here = f"this machine has {own[name].version if name in own else 'none'}"
        there = f"the bundle has {wheels[name].version if name in wheels else 'none that fits'}"
        (notes if foreign(by, taken) else missing).append(f"{by} needs {requirement}: {here}, {there}")
    return taken, asked, missing, notes


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def select(manifest: dict, into: Path, own_paths: list[str], show: bool) -> list[Path]:
    """Wheels that this Python needs, in the order of their names.

    Raises:
        Problem: something is needed that neither the machine nor the bundle has; one line each.
    """
    files = [into / file["path"] for file in manifest["files"] if file["kind"] == "wheel"]
    tools = load_packaging(files)
    own = installed(own_paths, tools)
    wheels, unfit = bundled(files, tools)
    taken, asked, missing, notes = choose(manifest["requirements"], own, wheels, tools)
    if show:
        rows = [("package", "this machine", "bundle", "used")]
        for name in sorted(asked):
            used = "nothing" if taken[name] is None else "bundle" if taken[name].wheel else "this machine's"
            rows.append((name, *(found[name].version if name in found else "-" for found in (own, wheels)), used))
        print(table(rows))
        for note in notes:
            print(f"note: a package of this machine is not served: {note}")
    if missing:
        reasons = [unfit[name] for name in sorted(asked) if name in unfit and taken[name] is None]
        raise Problem("Packages are missing; nothing was installed.\n  " + "\n  ".join(missing + reasons), 3)
    return sorted(taken[name].wheel for name in asked if taken[name] is not None and taken[name].wheel)


def search_path(site: Path | None) -> list[str]:
    """sys.path without what a bundle put there itself."""
    ours = {path.resolve() for path in (site, Path(__file__).parent) if path}
    return [entry for entry in sys.path if Path(entry or ".").resolve() not in ours]


def install(manifest: dict, into: Path, site: Path) -> None:
    """Put the wheels for which this Python has nothing that serves into `site`, all or none of them.

    Raises:
        Problem: packages are missing, `site` holds something else, or pip fails.
    """
    wheels = select(manifest, into, search_path(site), show=True)
    record = {"python": sys.executable, "version": sys.version, "wheels": {wheel.name: digest(wheel) for wheel in wheels}}
    mark = site / ".cupel-bundle.json"
    if site.exists() and any(site.iterdir()) and not mark.is_file():
        raise Problem(f"{site} is not empty and was not made by this script: name another folder")
    if mark.is_file() and json.loads(mark.read_text()) == record:
        print(f"{len(wheels)} wheels are installed in {site} already")
    else:
        site.parent.mkdir(parents=True, exist_ok=True)
        fresh = site.with_name(f".{site.name}.{os.getpid()}.tmp")
        try:
            fresh.mkdir()
            if wheels:
                command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--quiet",
                           "--no-index", "--no-deps", "--no-cache-dir", "--target", str(fresh), *map(str, wheels)]
                if subprocess.run(command, check=False).returncode:
                    raise Problem(f"pip failed, see above; if this Python has no pip: {sys.executable} -m ensurepip", 3)
            (fresh / mark.name).write_text(json.dumps(record))
            if site.exists():
                shutil.rmtree(site)
            os.replace(fresh, site)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        print(f"{len(wheels)} wheels installed in {site}")
    (into / STATE / "site.json").write_text(json.dumps({"site": str(site), "python": sys.executable}))


def run(manifest: dict, into: Path, arguments: list[str]) -> int:
    """Snakemake in the unpacked repository, offline, with the configuration of the bundle.

    Raises:
        Problem: packages are missing, or were installed for another Python.
    """
    record = into / STATE / "site.json"
    site = None
    if record.is_file():
        content = json.loads(record.read_text())
        site = Path(content["site"])
        if content["python"] != sys.executable or not site.is_dir():
            raise Problem(f"packages were installed in {site} for {content['python']}: use that Python, or --install again", 3)
    else:
        lacking = select(manifest, into, search_path(None), show=False)
        if lacking:
            raise Problem(f"{len(lacking)} packages are to be installed first: add --install", 3)
    ours = [str(site)] if site else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*ours, str(into / "workflow"), *filter(None, [os.environ.get("PYTHONPATH")])])
    if site:  # templates of nbconvert lie beside packages, not in them
        jupyter = [str(site / "share" / "jupyter"), *filter(None, [os.environ.get("JUPYTER_PATH")])]
        environment["JUPYTER_PATH"] = os.pathsep.join(jupyter)
    command = [sys.executable, "-m", "snakemake", f"--configfile={CONFIG}", *arguments]
    sys.stdout.flush()
    return subprocess.run(command, cwd=into, env=environment, check=False).returncode


# --------------------------------------------------------------------------------------------------------------------- main


def main(arguments: list[str]) -> int:
    """Unpack, then install, then run, as far as asked for."""
    here = Path(__file__).resolve().parent
    snakemake = None
    if "--run" in arguments:  # all that follows is Snakemake's
        cut = arguments.index("--run")
        arguments, snakemake = arguments[:cut], arguments[cut + 1:]
        snakemake = snakemake[1:] if snakemake[:1] == ["--"] else snakemake
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="--run [--] [ARGUMENT ...]: run Snakemake in the repository with these arguments; must come last")
    parser.add_argument("--parts", type=Path, default=here, metavar="DIR",
                        help="folder of the parts (default: beside this file)")
    parser.add_argument("--into", type=Path, default=here / "cupel", metavar="DIR",
                        help="where to unpack (default: %(default)s)")
    parser.add_argument("--install", type=Path, nargs="?", const=Path(), metavar="DIR",
                        help=f"install what this Python lacks into DIR (default: {STATE}/site where it is unpacked)")
    options = parser.parse_args(arguments)
    into = options.into.resolve()
    manifest = read_manifest(here)
    unpacker = Unpacker(manifest, options.parts, into)
    missing, damaged = unpacker.run()
    for path in unpacker.kept:
        print(f"kept as changed on this machine: {path}")
    total = len(manifest["files"])
    there = sum(unpacker.settle(file) for file in manifest["files"])
    print(f"{there} of {total} files are in {into}, {unpacker.written} written now, all verified")
    if missing or damaged:
        raise Problem("The bundle is not complete; run this again when these parts are here.\n  "
                      + "\n  ".join(damaged + missing), 2)
    if there < total:
        raise Problem(f"{total - there} files changed while they were unpacked: run this again")
    if options.install is not None:
        install(manifest, into, into / STATE / "site" if options.install == Path() else options.install.resolve())
    return 0 if snakemake is None else run(manifest, into, snakemake)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - it is run by whatever Python the machine has
        sys.exit(f"unpack.py needs Python 3.11 or newer, this is {sys.version.split()[0]} ({sys.executable})")
    try:
        sys.exit(main(sys.argv[1:]))
    except Problem as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.code)
