"""ScienceQA (Lu et al., NeurIPS 2022), the questions that have a picture: 6,218 for training, 2,017 for testing.

The body of a prompt is that of LLaVA (bye SPEC 4): `Context: <hint>`, the question, the options with letters. Where a
question has no hint, no line of context stands there.
"""

from pathlib import Path

from cupel.sources import Hub, Raw, Source
from cupel.vision_language.datasets.base import Description, choice


def read_parquet(paths: list[Path]) -> dict:
    """The hub's form: a parquet file per split with image (bytes and path, or null), question, choices, answer, hint.

    The id of a sample is the row of its split, counted with the rows that have no picture.
    """
    import pyarrow.parquet

    content, bytes_of = {"pictures": lambda keys: enumerate(bytes_of[key] for key in keys)}, {}
    for split, path in zip(("train", "test"), paths, strict=True):
        table = pyarrow.parquet.read_table(path, columns=["image", "question", "choices", "answer", "hint"])
        content[split] = []
        for k, row in enumerate(table.to_pylist()):
            if not row["image"] or not row["image"]["bytes"]:
                continue
            identity, hint = f"scienceqa-{split}-{k}", (row["hint"] or "").strip()
            bytes_of[identity] = row["image"]["bytes"]
            content[split].append(choice(identity, identity, row, f"Context: {hint}\n" if hint else ""))
    return content


_REVISION = "f18b0a70359ebfb41f658fd564208d0355b013f4"
_FILES = tuple(
    Raw(f"scienceqa/{Path(file).name}", f"sha256:{checksum}", Hub("derek-thomas/ScienceQA", file, _REVISION))
    for file, checksum in (
        ("data/train-00000-of-00001-1028f23e353fbe3e.parquet",
         "62c90a28e3fb1bc0ad7bbcab1ac62b483ae6758291a655944d8f494bf6445745"),
        ("data/test-00000-of-00001-f0e719df791966ff.parquet",
         "235e92d1f30155266df76bc9f28fc6e4fcb6bec2c6a8c7d67f9086ea6b392a84"),
    )
)

DESCRIPTION = Description(
    name="scienceqa",
    task="choice",
    licence="CC BY-NC-SA 4.0",
    sources=(Source("hub", _FILES, read_parquet),),
    published={"train": 6_218, "test": 2_017},
)
