"""Answers of a model: batched, greedy, resumable (bye SPEC 6: greedy instead of the sampling of the released code)."""

from collections.abc import Sequence
from pathlib import Path

from cupel.vision_language.models import VisionLanguageModel
from cupel.vision_language.streaming import stream


def answer(model: VisionLanguageModel, records: Sequence[dict], out: str | Path | None = None, *, max_new_tokens: int = 16,
           batch_size: int | None = None, title: str = "answers") -> list[str]:
    """Greedy answers, stripped, in the order of the records.

    Args:
        model, records, batch_size, title: see `stream`.
        out: parquet file with columns `id` and `answer`.
        max_new_tokens: where an answer is cut off if the model does not end it.
    """
    from transformers import GenerationConfig

    ends = model.network.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=model.tokenizer.pad_token_id,
                                eos_token_id=sorted({*ends, model.tokenizer.eos_token_id}))

    def compute(batch: dict) -> list[dict]:
        del batch["position_ids"]  # generate counts them itself, from the mask, for every new token too
        ids = model.network.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
        return [{"answer": text.strip()} for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    table = stream(model, records, compute, out, run=("answers", max_new_tokens), batch_size=batch_size, room=max_new_tokens,
                   title=title)
    return table["answer"].tolist() if len(records) else []
