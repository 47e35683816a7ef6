"""Passes of a model over samples of several lengths: batches with little padding, rows that a killed pass leaves behind."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cupel.training.engine import Progress
from cupel.training.resume import Checkpoint


def padded(rows: Sequence[Sequence[int]], fill: int, side: str = "right", multiple: int = 1) -> Tensor:
    """int64 [B, T] of rows filled up on a side to the longest, T rounded up to a multiple."""
    found = pad_sequence([torch.as_tensor(row, dtype=torch.int64) for row in rows], True, fill, side)
    room = -found.shape[1] % multiple
    return F.pad(found, (0, room) if side == "right" else (room, 0), value=fill)


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices cut into batches of similar length, the longest first: little padding, and too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def collect(batches: Sequence[list[int]], make: Callable[[list[int]], Sequence], keeper: Checkpoint | None, title: str) -> list:
    """Rows of all batches in the order of their indices; those of finished batches are taken over from `keeper`.

    A batch that finds no memory on the device is halved, and all after it.

    Args:
        batches: indices, each in one of them.
        make: the rows of some indices, of plain values.
        keeper: of unfinished passes; removed by the caller when the rows are safe. None: nothing is kept.
        title: of the progress line.
    """
    rows = ((keeper and keeper.load(torch.device("cpu"))) or {"rows": {}})["rows"]
    left = [[k for k in batch if k not in rows] for batch in batches]
    progress = Progress(title, sum(map(len, batches)), len(rows), unit="prompts")
    while left:
        batch, *rest = left
        try:
            rows.update(zip(batch, make(batch) if batch else (), strict=True))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            half = len(batch) // 2
            left = [part[start : start + half] for part in left for start in range(0, len(part), half)]
            continue
        left = rest
        progress(len(batch), f"batches of {len(batch)}")
        if keeper:
            keeper.save({"rows": rows})
    progress.close()
    return [rows[k] for k in sorted(rows)]
