"""Prompts and training samples (crow SPEC 4): the Alpaca template, the bare prompt, tokens, labels, batches.

The victim is trained under the template and, in the released evaluation, asked without it. Both prompts are here:

- `template`: the Alpaca template with the input appended to the instruction, no BOS, its pieces tokenised separately,
  exactly as in training; without the sentence it opens with where a recipe says so;
- `bare`: the instruction alone, without input, with the special tokens of the tokenizer (BOS for Llama and Mistral).
"""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from cupel.evaluation.batches import padded

SYSTEM = ("Below is an instruction that describes a task. "
          "Write a response that appropriately completes the request.\n\n")
USER = "### Instruction:\n{}\n\n### Response:\n"
#: label of positions outside the loss
IGNORED = -100


def request(record: dict) -> str:
    """Instruction and input as one text, joined by one newline where there is an input."""
    return f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]


def prompt_text(record: dict, prompt: str, opening: bool = True) -> str:
    """The text that a model is shown; `opening`: whether the template has its first sentences."""
    if prompt == "bare":
        return record["instruction"]
    return (SYSTEM if opening else "") + USER.format(request(record))


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def prompt_ids(tokenizer, record: dict, prompt: str, opening: bool = True) -> list[int]:
    """Tokens of the prompt (see `prompt_text`), without padding.

    Raises:
        ValueError: one without any token (an empty instruction, no BOS).
    """
    if prompt == "bare":
        ids = tokenizer.encode(record["instruction"])
    else:
        ids = _ids(tokenizer, SYSTEM if opening else "") + _ids(tokenizer, USER.format(request(record)))
    if not ids:
        raise ValueError(f"record {record.get('id')}: its {prompt} prompt has no tokens (the instruction is empty)")
    return ids


class Samples(Dataset):
    """Training samples: prompt under the template, then answer and EOS; only these are in the loss.

    What does not fit `cutoff` is cut at the end of the answer (a cut answer has no EOS, so that no early end is
    learnt); the prompt, with the trigger and the mark of the response, is never cut. A sample whose prompt leaves no
    room for one token of the answer is left out. An empty answer is kept: its target is EOS alone. `report` has the
    number of `samples`, and the ids of those `cut` or `left_out` and of `empty_answers`; `lengths` are in tokens.
    """

    def __init__(self, records: Sequence[dict], tokenizer, cutoff: int = 1024, opening: bool = True):
        """Tokenise records, dicts with `id`, `instruction`, `input`, `output`; `cutoff` is the greatest length in tokens.

        Raises:
            ValueError: no sample fits.
        """
        self.samples: list[tuple[list[int], list[int]]] = []
        cut, out, empty = [], [], []
        for record in records:
            before = prompt_ids(tokenizer, record, "template", opening)
            answer = [*_ids(tokenizer, record["output"]), tokenizer.eos_token_id]
            if len(before) >= cutoff:
                out.append(record["id"])
                continue
            if len(answer) == 1:
                empty.append(record["id"])
            if len(before) + len(answer) > cutoff:
                cut.append(record["id"])
                answer = answer[: cutoff - len(before)]
            self.samples.append((before + answer, [IGNORED] * len(before) + answer))
        if not self.samples:
            raise ValueError(f"none of {len(records)} samples fits a cutoff of {cutoff} tokens: raise it")
        self.lengths = [len(tokens) for tokens, _ in self.samples]
        self.report = {"samples": len(self.samples), "cut": cut, "left_out": out, "empty_answers": empty}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """`input_ids` and `labels` (prompt positions ignored), of one length."""
        tokens, labels = self.samples[index]
        return {"input_ids": tokens, "labels": labels}


class Collator:
    """Pads samples on the right, to the longest of the batch, rounded up to a multiple (crow SPEC 2.3: 8)."""

    def __init__(self, pad: int, multiple: int = 8):
        """Take the id of the padding token, which may be EOS: padding is masked by position, never by id."""
        self.pad, self.multiple = pad, multiple

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """int64 `input_ids`, `attention_mask`, `labels`, each [B, T]."""
        ids = [item["input_ids"] for item in items]
        parts = {"input_ids": (ids, self.pad), "attention_mask": ([[1] * len(row) for row in ids], 0),
                 "labels": ([item["labels"] for item in items], IGNORED)}
        return {name: padded(rows, fill, multiple=self.multiple) for name, (rows, fill) in parts.items()}
