"""A pass of a model over records that is written to parquet as it goes, and goes on where it was stopped."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cupel.files import atomic
from cupel.training.engine import Progress
from cupel.vision_language.models import Encoder, fitting_batch


def _write(path: Path, table: pd.DataFrame, identity: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = pa.Table.from_pandas(table, preserve_index=False)
    data = data.replace_schema_metadata({**(data.schema.metadata or {}), "cupel": identity})
    with atomic(path) as temporary:
        pq.write_table(data, temporary, compression="zstd")


def _read(path: Path, identity: str) -> pd.DataFrame | None:
    """The table, or None for a file that is absent, damaged or of another run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        data = pq.read_table(path)
    except (OSError, pa.ArrowInvalid):
        return None
    return data.to_pandas() if (data.schema.metadata or {}).get(b"cupel", b"").decode() == identity else None


def stream(encoder: Encoder, ids: Sequence[str], compute: Callable[[np.ndarray], dict[str, Sequence]], out: str | Path | None,
           identity: str, *, batch_size: int | None = None, chunk: int = 2048, room: int = 0, title: str = "") -> pd.DataFrame:
    """Run `compute` on all records in batches, longest first, and write one row per record.

    Finished chunks lie as parts in the folder `<out>.parts` until the whole is written; a killed run keeps them.

    Args:
        encoder: of the records.
        ids: of the records.
        compute: from record numbers [B] to columns of B values.
        out: parquet file with the columns `id` and those of `compute`, rows in the order of the records; None writes
            nothing.
        identity: of the run; files of another run are not used.
        batch_size: records per batch; None: as many as a third of the free memory holds. A batch that still finds no
            memory on the device is halved.
        chunk: records per part.
        room: tokens that each record grows by (generation).
        title: of the progress line.
    """
    out = Path(out) if out else None
    if out and (done := _read(out, identity)) is not None:
        return done
    parts = out.with_name(f"{out.name}.parts") if out else None
    order = np.argsort(-encoder.lengths, kind="stable")
    if batch_size is None:
        batch_size = fitting_batch(encoder.model, int(encoder.lengths.max(initial=1)) + room)
    progress, tables = Progress(title, len(order)), []
    for first in range(0, len(order), chunk):
        chosen = order[first : first + chunk]
        path = parts / f"part-{first:08d}.parquet" if parts else None
        table = _read(path, identity) if path else None
        if table is None or len(table) != len(chosen):
            rows: list[dict] = []
            while sum(len(row["number"]) for row in rows) < len(chosen):
                begin = sum(len(row["number"]) for row in rows)
                batch = chosen[begin : begin + batch_size]
                try:
                    rows.append({"number": batch, **compute(batch)})
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    batch_size = len(batch) // 2
                    torch.cuda.empty_cache()
                    continue
                progress(len(batch), f"batches of {batch_size}")
            table = pd.concat([pd.DataFrame(row) for row in rows], ignore_index=True)
            if path:
                _write(path, table, identity)
        else:
            progress(len(chosen), "found on disk")
        tables.append(table)
    progress.close()
    whole = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"number": []})
    whole = whole.sort_values("number", ignore_index=True).drop(columns="number")
    whole.insert(0, "id", [str(name) for name in ids])
    if out:
        _write(out, whole, identity)
        shutil.rmtree(parts, ignore_errors=True)
    return whole
