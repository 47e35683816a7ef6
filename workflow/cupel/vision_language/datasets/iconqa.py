"""IconQA (Lu et al., 2021), multi-text-choice: 18,946 / 6,316 / 6,316 questions on abstract diagrams.

The paper trains on 10,000 and tests on 6,316 (bye SPEC 4: so the sub-task and the use of the whole test split are
inferred from the numbers). How its sample was drawn is not said: uniformly here.
"""

import json
import re
import zipfile
from pathlib import Path

from cupel import archives
from cupel.sources import Raw, Source, Url
from cupel.vision_language.datasets.base import Description, choice, from_files, from_zip, verified_tree


class Archive(Raw):
    """A zip whose publisher gives no checksum: it is taken if every file in it has the checksum that the zip states."""

    def verified(self, path: Path) -> bool:
        try:
            with zipfile.ZipFile(path) as pack:
                return pack.testzip() is None
        except (OSError, zipfile.BadZipFile):
            return False


def read_archive(paths: list[Path]) -> dict:
    """The official archive: `.../iconqa/<split>/choose_txt/<problem>/{data.json,image.png}`."""
    found = re.compile(r"(?:.*/)?(train|test)/choose_txt/(\d+)/data\.json").fullmatch
    problems = sorted(filter(None, map(found, archives.names(paths[0]))), key=lambda match: int(match[2]))
    content = {"train": [], "test": [], "pictures": from_zip(paths[0])}
    for match, problem in zip(problems, archives.read(paths[0], *(match[0] for match in problems)), strict=True):
        picture = match[0].removesuffix("data.json") + "image.png"
        content[match[1]].append(choice(f"iconqa-{match[2]}", picture, json.loads(problem)))
    return content


def read_excerpt(paths: list[Path]) -> dict:
    """A folder `choose_txt/<problem>/{data.json,image.png}` without splits; `paths[0]` is the first `data.json` of it."""
    folder = paths[0].parents[1]
    files = verified_tree(folder, _EXCERPT_TREE)
    problems = sorted((path for path in files if path.name == "data.json"), key=lambda path: int(path.parent.name))
    return {"pictures": from_files(folder),
            "all": [choice(f"iconqa-{path.parent.name}", str(path.with_name("image.png")), json.loads(path.read_text()))
                    for path in problems]}


_UNPUBLISHED = "sha256:none is published; the checksums inside the zip are tested"
_ARCHIVE = Archive("iconqa_data.zip", _UNPUBLISHED, Url("https://iconqa2021.s3.us-west-1.amazonaws.com/iconqa_data.zip"))
_EXCERPT = Raw("iconqa/choose_txt/7/data.json", "sha256:ad9f19d4a20fcc382302dba7ee76e8e7b9086cfa4bc8bcc560243f282ff3047c")
_EXCERPT_TREE = "90a029d7efa506040b3afb0c4eee1b523307b3b8d5efe0d3c55c48f0c5e8b603"

DESCRIPTION = Description(
    name="iconqa",
    task="choice",
    licence="CC BY-NC-SA 4.0",
    sources=(Source("official", (_ARCHIVE,), read_archive),),
    excerpts=(Source("mirror", (_EXCERPT,), read_excerpt),),
    published={"train": 18_946, "test": 6_316},
    drawn={"train": 10_000},
)
