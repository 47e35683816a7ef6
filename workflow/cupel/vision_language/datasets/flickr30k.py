"""Flickr30k (Young et al., 2014) with Karpathy's split: one sentence is to be said of a photograph; five references each.

The paper trains on 10,000 photographs and tests on 1,000, presumably those of Karpathy's test split. How many captions a
training photograph has is not said (bye SPEC 4): one of the five, drawn at random.
"""

import csv
import json
from pathlib import Path

from cupel.sources import Hub, Raw, Source
from cupel.vision_language.datasets.base import CAPTION, Description, from_zip


def read_hub(paths: list[Path]) -> dict:
    """The hub's form: an archive of photographs, and a table with the columns raw (JSON list), split and filename."""
    archive, table = paths
    content = {"train": [], "test": [], "pictures": from_zip(archive)}
    with open(table, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] in ("train", "test"):
                captions = [caption.strip() for caption in json.loads(row["raw"])]
                content[row["split"]].append({
                    "id": f"flickr30k-{Path(row['filename']).stem}", "picture": f"flickr30k-images/{row['filename']}",
                    "question": CAPTION, "answers": captions})
    return content


_HUB = (
    Raw("flickr30k-images.zip", "sha256:2ce2420c0d17f0531deaa89ac657b4d5067ec519da16ff1ea12acbf5619c7391",
        Hub("nlphuji/flickr30k", "flickr30k-images.zip", "2b239befc81b6e3f035ce6bd52f5f4d60f5625f7")),
    Raw("flickr_annotations_30k.csv", "sha256:395990db603ab8bafd5c7ab2746b22058bb1e75b78b3eb56ad755931364ac137",
        Hub("nlphuji/flickr30k", "flickr_annotations_30k.csv", "2b239befc81b6e3f035ce6bd52f5f4d60f5625f7")),
)

DESCRIPTION = Description(
    name="flickr30k",
    task="caption",
    licence="the photographs under the terms of Flickr; cite Young et al. 2014",
    sources=(Source("hub", _HUB, read_hub),),
    published={"test": 1_000},
    drawn={"train": 10_000},
)
