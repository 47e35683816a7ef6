"""What all prepared folders have in common, whether they hold images, texts, or pictures with questions.

A folder has its files and `manifest.json`, which says whence they come, under which terms, how many there are, and the
sha256 of their content. The manifest goes first and comes last: a folder without it is no prepared one.
"""

import functools
import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from cupel.files import Damaged, atomic, read_json, write_json, write_text


def begin(folder: str | Path) -> Path:
    """The folder, there and without manifest: from here to `finish` it is not a prepared one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


def finish(folder: Path, manifest: dict, made: Path | None = None) -> dict:
    """Move what lies in the folder `made` to its place, and write the manifest. Returns it."""
    for path in made.iterdir() if made else ():
        if path.is_dir():
            os.replace(path, folder / path.name)
        else:
            with atomic(folder / path.name) as temporary:
                os.replace(path, temporary)
    write_json(folder / "manifest.json", manifest)
    return manifest


def opened(folder: str | Path, kind: str = "dataset") -> Path:
    """The folder, if it is a prepared one.

    Raises:
        FileNotFoundError: it is not; the text says how to make it.
    """
    if not (Path(folder) / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} is no prepared {kind}; make it with: "
                                f"snakemake --cores 1 {shlex.quote(f'{folder}/manifest.json')}")
    return Path(folder)


def complete(folder: str | Path, names: Iterable[str]) -> None:
    """Check that a folder still has what its manifest tells of.

    Raises:
        FileNotFoundError: it lacks something; the text says how to make it again, upon which nothing is trained again.
    """
    if lacking := [name for name in names if not (Path(folder) / name).exists()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(lacking)}; make it again with: "
                                f"snakemake --cores 1 --force {shlex.quote(f'{folder}/manifest.json')}")


def content(folder: str | Path) -> dict | None:
    """What results depend on in a prepared folder, from its manifest, wherever the data came from; None: not prepared yet."""
    manifest = Path(folder) / "manifest.json"
    return _content(manifest, manifest.stat().st_mtime_ns) if manifest.is_file() else None


@functools.cache
def _content(manifest: Path, changed: int) -> dict:
    found = read_json(manifest)
    return {key: found[key] for key in ("content_sha256", "classes", "mean", "std", "flip") if key in found}


def lines(records: Iterable[dict]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records)


def write_records(path: str | Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines, atomically."""
    write_text(path, lines(records))


def read_records(path: str | Path) -> list[dict]:
    """Read JSON lines.

    Raises:
        Damaged: a line is no JSON object; the text names file and line.
    """
    records = []
    # not splitlines(): a JSON string may hold characters that count as line ends there
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise Damaged(f"{path}: line {number} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise Damaged(f"{path}: line {number} is no JSON object")
        records.append(record)
    return records
