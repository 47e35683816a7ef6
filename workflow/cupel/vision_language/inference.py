"""Answers of a model: batched, greedy, resumable (bye SPEC 6: greedy instead of the sampling of the released code)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cupel.vision_language.models import Encoder, VisionLanguageModel, fingerprint, inference
from cupel.vision_language.streaming import stream


def answer(model: VisionLanguageModel, records: Sequence[dict], out: str | Path | None = None, *, max_new_tokens: int = 16,
           batch_size: int | None = None, chunk: int = 2048, title: str = "answers") -> list[str]:
    """Greedy answers, stripped, in the order of the records.

    Args:
        model: to ask.
        records: see `Encoder`; their answers are not looked at.
        out: parquet file with columns `id` and `answer`, written in parts and resumed (see `stream`).
        max_new_tokens: where an answer is cut off if the model does not end it.
        batch_size, chunk: see `stream`.
        title: of the progress line.
    """
    from transformers import GenerationConfig

    encoder = Encoder(model, records, keep_mb=1024)
    ends = model.network.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=model.tokenizer.pad_token_id,
                                eos_token_id=sorted({*ends, model.tokenizer.eos_token_id}))

    def compute(numbers: np.ndarray) -> dict[str, list[str]]:
        batch = encoder.batch(numbers)
        del batch["position_ids"]  # generate counts them itself, from the mask, for every new token too
        ids = model.network.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
        return {"answer": [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]}

    identity = fingerprint(model, records, "answers", max_new_tokens, chunk, batch_size) if out else ""
    with inference(model):
        table = stream(encoder, [record["id"] for record in records], compute, out, identity, batch_size=batch_size,
                       chunk=chunk, room=max_new_tokens, title=title)
    return table["answer"].tolist() if len(records) else []
