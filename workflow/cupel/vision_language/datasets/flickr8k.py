"""500 photographs of Flickr8k (Hodosh et al., 2013), which stand in where Flickr30k cannot be had: the same task."""

import csv
import io
from pathlib import Path

from cupel.sources import Raw, Source
from cupel.vision_language.datasets.base import CAPTION, Description, from_files, verified_tree


def read_folder(paths: list[Path]) -> dict:
    """A folder with `captions.txt` (the columns image and caption) and `images/`; `paths[0]` is the former."""
    folder = paths[0].parent / "images"
    verified_tree(folder, _EXCERPT_TREE)
    captions: dict[str, list[str]] = {}
    for row in csv.DictReader(io.StringIO(paths[0].read_text(encoding="utf-8"))):
        captions.setdefault(row["image"], []).append(row["caption"].strip())
    return {"pictures": from_files(folder),
            "all": [{"id": f"flickr8k-{Path(name).stem}", "picture": name, "question": CAPTION, "answers": answers}
                    for name, answers in sorted(captions.items())]}


_EXCERPT = Raw("flickr8k/captions.txt", "sha256:5f8d05e6788feda8613779926aecbe18083e5c31b24f818ea60e539851861d56")
_EXCERPT_TREE = "9549ff298c224aad8f9f7231650cad011e72dba5393895f62172deba2e2dc397"

DESCRIPTION = Description(
    name="flickr8k",
    task="caption",
    licence="the photographs under the terms of Flickr; cite Hodosh et al. 2013",
    excerpts=(Source("mirror", (_EXCERPT,), read_folder),),
    notes="a stand-in for Flickr30k: the same task on 500 photographs, reduced to at most 200 pixels a side",
)
