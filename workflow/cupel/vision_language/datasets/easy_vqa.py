"""easy-VQA (Zhou, 2018): 4,000 + 1,000 pictures of one coloured shape, 64×64, with 38,575 + 9,673 questions, 13 answers.

Not a dataset of the paper: it stands in where no other can be had (the package index has it whole). Questions are asked
as they are, without a suffix: the paper has none for it.
"""

import json
from pathlib import Path

from cupel import archives
from cupel.sources import Pip, Raw, Source
from cupel.vision_language.datasets.base import Description, from_zip


def read_wheel(paths: list[Path]) -> dict:
    """The package: `easy_vqa/data/<split>/questions.json`, a list of [question, answer, picture], and the pictures."""
    splits, content = ("train", "test"), {"pictures": from_zip(paths[0])}
    tables = archives.read(paths[0], *(f"easy_vqa/data/{split}/questions.json" for split in splits))
    for split, rows in zip(splits, map(json.loads, tables), strict=True):
        content[split] = [{"id": f"easy_vqa-{split}-{k}", "picture": f"easy_vqa/data/{split}/images/{picture}.png",
                           "question": question, "answer": answer} for k, (question, answer, picture) in enumerate(rows)]
    return content


_WHEEL = Raw("easy_vqa-1.0-py3-none-any.whl", "sha256:fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
             Pip("easy-vqa==1.0"))

DESCRIPTION = Description(
    name="easy_vqa",
    task="vqa",
    licence="MIT (Victor Zhou)",
    sources=(Source("package", (_WHEEL,), read_wheel),),
    published={"train": 38_575, "test": 9_673},
    size=(64, 64),
    notes="a stand-in: pictures of synthetic shapes, no dataset of the paper",
)
