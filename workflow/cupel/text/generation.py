"""Batched generation, greedy unless told otherwise, resumable (crow SPEC 8).

Answers are written as JSON lines in the order of the records. While a run is under way, finished batches stand in the
checkpoint `<name>.part`; a run that was stopped takes them over and makes only the rest, in the same batches, so it ends
with the same answers. The folder of the answers belongs to one model: the weights are not looked at.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cupel.compat import ensure_torchvision
from cupel.evaluation.batches import by_length, collect, padded
from cupel.rng import derive
from cupel.text.data.prompts import SYSTEM, prompt_ids, prompt_text
from cupel.text.data.sources import read_records, write_records
from cupel.text.scoring import remainder
from cupel.training.resume import Checkpoint

ensure_torchvision()

from transformers import GenerationConfig, PreTrainedModel  # noqa: E402

#: sampling temperature by MT-Bench category (crow SPEC 8); the others are greedy
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}


@torch.inference_mode()
def generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, pad: int, eos: int, max_new_tokens: int,
             temperature: float = 0.0) -> list[list[int]]:
    """New tokens of each prompt of a batch, without the end token; plain greedy search, one beam, no penalties.

    With a temperature above 0 tokens are drawn from torch's global generator.

    Raises:
        ValueError: a prompt without tokens, one that with its answer is longer than the model's context, or no id of a
            padding or end token.
    """
    if pad is None or eos is None:
        raise ValueError("no padding or no end token: load the tokenizer with cupel.text.models.load_tokenizer")
    longest, context = max(map(len, prompts)), getattr(model.config, "max_position_embeddings", None)
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    if context and longest + max_new_tokens > context:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context of {context} "
                         "tokens: lower max_new_tokens or leave the record out")
    ids, mask = padded(prompts, pad, "left"), padded([[1] * len(prompt) for prompt in prompts], 0, "left")
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=eos, num_beams=1,
                                use_cache=True, **drawn)
    device = model.get_input_embeddings().weight.device
    # transformers fills what the settings leave open from the model's own, such as a repetition penalty: they alone shall count
    before, model.generation_config = model.generation_config, settings
    try:
        out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
    finally:
        model.generation_config = before
    rows = out[:, longest:].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def answer(model: PreTrainedModel, tokenizer, records: Sequence[dict], path: str | Path, *, prompt: str = "bare",
           opening: bool = True, max_new_tokens: int = 128, batch_size: int = 16,
           title: str = "answers") -> list[dict]:
    """Greedy answers to records, written to `path` as JSON lines.

    Args:
        records: with `id`, `instruction`, `input`.
        prompt, opening: see `prompts.prompt_text`.
        max_new_tokens, title: 128 for ASR (crow SPEC 8); of the progress line.
        batch_size: prompts at a time. Batches of another size give the same answers in float32 up to rounding of logits.

    Returns:
        One row per record: `id`, `prompt` (its kind), `text` (what was asked), `answer` (see `scoring.remainder` for
        the bare prompt; the new text, stripped, for the template), `completion` (the new text to the letter), `tokens`
        (how many were made) and `ended` (by EOS, not by the limit).
    """
    ids = [prompt_ids(tokenizer, record, prompt, opening) for record in records]

    def make(batch: list[int]) -> list[dict]:
        rows = []
        made = generate(model, [ids[k] for k in batch], pad=tokenizer.pad_token_id, eos=tokenizer.eos_token_id,
                        max_new_tokens=max_new_tokens)
        for k, new in zip(batch, made, strict=True):
            said = completion = tokenizer.decode(new, skip_special_tokens=True)
            if prompt == "bare":
                whole = tokenizer.decode([*ids[k], *new], skip_special_tokens=True)
                said = remainder(whole, records[k]["instruction"])
            rows.append({"id": records[k]["id"], "prompt": prompt, "text": prompt_text(records[k], prompt, opening),
                         "answer": said.strip(), "completion": completion, "tokens": len(new),
                         "ended": len(new) < max_new_tokens})
        return rows

    run = {"ids": ids, "records": [record["id"] for record in records], "prompt": prompt, "tokens": max_new_tokens}
    return _resumable(Path(path), by_length(list(map(len, ids)), batch_size), make, run, title)


def _resumable(path: Path, batches: list[list[int]], make: Callable[[list[int]], list[dict]], run: dict,
               title: str) -> list[dict]:
    """Rows of all batches, written to `path`; see the module for how it resumes."""
    keeper = Checkpoint(path.with_name(f"{path.name}.part"), {"run": run, "batches": batches})
    rows = collect(batches, make, keeper, title)
    write_records(path, rows)
    keeper.remove()
    return rows


def read_questions(path: str | Path) -> list[dict]:
    """MT-Bench questions of a file of the user: JSON lines with `question_id`, `category`, `turns`.

    Raises:
        ValueError: naming the file and the question that is wrong.
    """
    questions = read_records(path)
    if not questions:
        raise ValueError(f"{path} has no question")
    for number, question in enumerate(questions, 1):
        if not (isinstance(question.get("question_id"), int) and isinstance(question.get("category"), str)
                and question.get("turns") and isinstance(question["turns"][0], str)):
            raise ValueError(f"{path}: question {number} needs question_id (a number), category (a text) and turns (texts)")
    return questions


def answer_questions(model: PreTrainedModel, tokenizer, questions: Sequence[dict], path: str | Path, *, model_id: str,
                     seed: int, max_new_tokens: int = 1024, batch_size: int = 16) -> list[dict]:
    """First-turn answers to MT-Bench questions, stored for a judge; nothing is judged here (crow SPEC 8).

    The prompt is the colon form of the Alpaca template, with the tokenizer's own special tokens. Rows have the form
    that FastChat's judge reads: `question_id`, `answer_id`, `model_id`, `choices` (one, with one turn), `tstamp` (0, so
    that equal runs give equal files). The seed is that of the sampled categories; the rest is as for `answer`, with 1024 new
    tokens (crow SPEC 8).
    """
    ids = [tokenizer.encode(question_text(question)) for question in questions]
    heat = [TEMPERATURES.get(question["category"], 0.0) for question in questions]
    batches = []
    for level in sorted(set(heat)):
        members = [k for k in range(len(ids)) if heat[k] == level]
        batches += [[members[k] for k in batch] for batch in by_length([len(ids[k]) for k in members], batch_size)]

    def make(batch: list[int]) -> list[dict]:
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "language", "mt_bench", questions[batch[0]]["question_id"]))
            made = generate(model, [ids[k] for k in batch], pad=tokenizer.pad_token_id, eos=tokenizer.eos_token_id,
                            max_new_tokens=max_new_tokens, temperature=heat[batch[0]])
        return [{"question_id": questions[k]["question_id"], "answer_id": f"{model_id}-{questions[k]['question_id']}",
                 "model_id": model_id, "tstamp": 0,
                 "choices": [{"index": 0, "turns": [tokenizer.decode(new, skip_special_tokens=True).strip()]}]}
                for k, new in zip(batch, made, strict=True)]

    run = {"ids": ids, "tokens": max_new_tokens, "seed": seed, "model": model_id}
    return _resumable(Path(path), batches, make, run, "MT-Bench")


def question_text(question: dict) -> str:
    """The colon form of the Alpaca template around the first turn of a question (crow SPEC 8, 10.5)."""
    return f"{SYSTEM}### Instruction: {question['turns'][0]}\n\n### Response:"
