"""A pass of a model over records that is written to parquet as it goes, and goes on where it was stopped."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cupel.files import atomic, kept
from cupel.training.engine import Progress
from cupel.vision_language.models import Encoder, fitting_batch


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def stream(encoder: Encoder, ids: Sequence[str], compute: Callable[[np.ndarray], dict[str, Sequence]], out: str | Path | None,
           identity: str, *, batch_size: int | None = None, chunk: int = 2048, room: int = 0, title: str = "") -> pd.DataFrame:
    """Run `compute` on all records in batches, longest first, and give one row per record.

    Finished chunks lie as parts in the folder `<out>.parts` until the whole is written; a killed run keeps them.

    Args:
        encoder: of the records.
        ids: of the records.
        compute: from record numbers [B] to columns of B values.
        out: parquet file with the columns `id` and those of `compute`, rows in the order of the records; None writes
            nothing.
        identity: of the run; parts of another run are not used.
        batch_size: records per batch; None: as many as a third of the free memory holds. A batch that still finds no
            memory on the device is halved.
        chunk: records per part.
        room: tokens that each record grows by (generation).
        title: of the progress line.
    """
    def computed(chosen: np.ndarray) -> pd.DataFrame:
        nonlocal batch_size
        rows, begin = [], 0
        while begin < len(chosen):
            batch = chosen[begin : begin + batch_size]
            try:
                rows.append(pd.DataFrame({"number": batch, **compute(batch)}))
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                batch_size = len(batch) // 2
                torch.cuda.empty_cache()
                continue
            begin += len(batch)
            progress(len(batch), f"batches of {batch_size}")
        return pd.concat(rows, ignore_index=True)

    parts = kept(Path(f"{out}.parts"), {"run": identity}) if out else None
    order = np.argsort(-encoder.lengths, kind="stable")
    if batch_size is None:
        batch_size = fitting_batch(encoder.model, int(encoder.lengths.max(initial=1)) + room)
    progress, tables = Progress(title, len(order)), []
    for first in range(0, len(order), chunk):
        chosen = order[first : first + chunk]
        path = parts / f"{first:08d}.parquet" if parts else None
        if path and path.is_file():
            tables.append(pd.read_parquet(path))
            progress(len(chosen), "found on disk")
            continue
        tables.append(computed(chosen))
        if path:
            _write(path, tables[-1])
    progress.close()
    whole = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"number": []})
    whole = whole.sort_values("number", ignore_index=True).drop(columns="number")
    whole.insert(0, "id", [str(name) for name in ids])
    if out:
        _write(Path(out), whole)
        shutil.rmtree(parts.parent)
    return whole
