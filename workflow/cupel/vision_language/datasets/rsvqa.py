"""RSVQA-LR (Lobry et al., 2020): 77,232 questions on 772 Sentinel-2 pictures of 256×256 pixels.

Official splits of 57,223 / 10,005 / 10,004 questions. The paper trains on 10,000 and tests on 10,004 (bye SPEC 4: so the
data set, low resolution, and the use of the whole test split are inferred from the numbers). Counts are asked for as
numbers: no ranges are made of them.
"""

import re
from pathlib import Path

from cupel import archives
from cupel.files import read_json
from cupel.sources import Raw, Source, Url
from cupel.vision_language.datasets.base import SHORT_ANSWER, Description, from_files, from_zip, verified_tree


def samples(questions: list[dict], answers: list[dict], picture_of: dict[int, str]) -> list[dict]:
    """The samples of one split: a split's files list the ids of the whole dataset, and only active entries belong to it.

    Raises:
        ValueError: a question without answer or picture.
    """
    answer_of: dict[int, str] = {}
    for answer in answers:
        if answer["active"]:
            answer_of.setdefault(answer["question_id"], str(answer["answer"]))
    chosen = []
    for question in questions:
        if not question["active"]:
            continue
        identity = question["id"]
        if identity not in answer_of or question["img_id"] not in picture_of:
            raise ValueError(f"question {identity} has no answer or no picture {question['img_id']}")
        chosen.append({"id": f"rsvqa-{identity}", "picture": picture_of[question["img_id"]],
                       "question": f"{question['question'].strip()}\n{SHORT_ANSWER}", "answer": answer_of[identity]})
    return chosen


def read_official(paths: list[Path]) -> dict:
    """Questions and answers of the training split, those of the test split, and the archive with `<picture>.tif`."""
    found = re.compile(r"(?:.*/)?(\d+)\.tif").fullmatch
    picture_of = {int(match[1]): match[0] for match in map(found, archives.names(paths[-1])) if match}
    train, test = (samples(read_json(paths[k])["questions"], read_json(paths[k + 1])["answers"], picture_of) for k in (0, 2))
    return {"train": train, "test": test, "pictures": from_zip(paths[-1])}


def read_excerpt(paths: list[Path]) -> dict:
    """Questions and answers without splits, and beside them `images/<picture>.png`."""
    folder = paths[0].parent / "images"
    picture_of = {int(path.stem): path.name for path in verified_tree(folder, _EXCERPT_TREE)}
    return {"pictures": from_files(folder),
            "all": samples(read_json(paths[0])["questions"], read_json(paths[1])["answers"], picture_of)}


_SITE = "https://zenodo.org/records/6344334/files/"
_OFFICIAL = tuple(Raw(name, f"md5:{md5}", Url(f"{_SITE}{name}?download=1")) for name, md5 in (
    ("LR_split_train_questions.json", "935d59a05d126496fe61c541b4ab2d55"),
    ("LR_split_train_answers.json", "a5ff787f9977b0050b9bbf4e32bbb533"),
    ("LR_split_test_questions.json", "9bddc53d7399a43378f743ec0ff1f95f"),
    ("LR_split_test_answers.json", "f925d70eb74bb4094966670cb4c2f840"),
    ("Images_LR.zip", "2329258d74d54600628b8652a0e42672"),
))
_EXCERPT = (
    Raw("rsvqa_lr/LR_questions.json", "sha256:8b16e8be7371bed7155e8b1aa70f5a304e09fa24a0d2f809ee67a23d2aa047a9"),
    Raw("rsvqa_lr/LR_answers.json", "sha256:afb9d60aeadcd52867385194c6a6c01e9ffb28a806bb783c1561bcb22f782182"),
)
_EXCERPT_TREE = "3cfc25cb77479ab75e54389ac8edc136d1e82352f9faf3321543aad7333684d4"

DESCRIPTION = Description(
    name="rsvqa",
    task="vqa",
    licence="CC BY 4.0 as commonly stated; cite Lobry et al. 2020",
    sources=(Source("official", _OFFICIAL, read_official),),
    excerpts=(Source("mirror", _EXCERPT, read_excerpt),),
    published={"train": 57_223, "test": 10_004},
    drawn={"train": 10_000},
    size=(256, 256),
)
