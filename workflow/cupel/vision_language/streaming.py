"""A pass of a model over records that ends in a table, and goes on where it was stopped."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from cupel.evaluation.batches import by_length, collect
from cupel.files import atomic
from cupel.training.resume import Checkpoint
from cupel.vision_language.models import Encoder, VisionLanguageModel, fingerprint, fitting_batch, inference


def stream(model: VisionLanguageModel, records: Sequence[dict], compute: Callable[[dict], list[dict]],
           out: str | Path | None, *, run: Sequence, batch_size: int | None = None, room: int = 0,
           dtype: type | None = None, title: str = "") -> pd.DataFrame:
    """Run `compute` on all records in batches, longest first, and give one row per record.

    Finished rows lie in the checkpoint `<out>.part` until the whole is written; a killed run keeps them.

    Args:
        model: to run, in eval mode here.
        records: see `Encoder`; their answers are not looked at.
        compute: from a batch of `Encoder` to B rows of plain values.
        out: parquet file with `id` and the columns of `compute`, in the order of the records; None writes nothing.
        run: JSON-able settings; rows of a run with others, or on other weights or records, are not used.
        batch_size: records per batch; None: as many as a third of the free memory holds.
        room: tokens that each record grows by (generation).
        dtype: of the columns.
        title: of the progress line.
    """
    encoder = Encoder(model, records, keep_mb=1024)
    size = batch_size or fitting_batch(model, int(encoder.lengths.max(initial=1)) + room)
    keeper = Checkpoint(f"{out}.part", {"run": fingerprint(model, records, *run, batch_size)}) if out else None
    with inference(model):
        rows = collect(by_length(encoder.lengths, size), lambda numbers: compute(encoder.batch(numbers)), keeper, title)
    table = pd.DataFrame(rows, dtype=dtype)
    table.insert(0, "id", [str(record["id"]) for record in records])
    if out:
        with atomic(out) as temporary:
            table.to_parquet(temporary, index=False, compression="zstd")
        keeper.remove()
    return table
