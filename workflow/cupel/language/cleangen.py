"""CleanGen: decoding that checks every drafted token against a reference model (crow SPEC 7; Table 9).

The target drafts k tokens greedily; one pass of the reference over them gives s_t = P_target(x_t) / P_ref(x_t); the draft
is cut at the first s_t ≥ threshold, where the reference's most likely token takes its place. Threshold 20 and k 4 are the
method's defaults; CROW states neither these nor its reference model (SPEC 13).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.language.layers import causal_lm


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        tokens: int64 [B, new], filled with the padding token after the end of a row.
        length: int64 [B], tokens of each row, the end-of-sequence token among them.
        replaced: int64 [B], how many of them the reference put.
    """

    tokens: Tensor
    length: Tensor
    replaced: Tensor


class _Decoder:
    """A model with its cache over a batch in which any slot may be masked out afterwards."""

    def __init__(self, model: nn.Module):
        self.model, self.cache = model, None

    def __call__(self, tokens: Tensor, mask: Tensor, positions: Tensor, keep: int) -> Tensor:
        """Log-probabilities float32 [B, keep, V] after the last `keep` of `tokens`, int64 [B, t].

        `mask` is over all slots, int64 [B, slots], `positions` those of the tokens, int64 [B, t].
        """
        output = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=self.cache,
                            use_cache=True, logits_to_keep=keep)
        self.cache = output.past_key_values
        return output.logits.float().log_softmax(-1)


@torch.inference_mode()
def generate(model: nn.Module, reference: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, max_new_tokens: int,
             eos_ids: set[int], pad_id: int, threshold: float = 20.0, draft: int = 4) -> Generated:
    """Decode a batch.

    Rows accept different numbers of tokens from a draft. Slots of rejected ones stay in both caches, masked out; positions
    are counted without them, so that each row is computed as it would be alone. (In models with a sliding window these
    slots use it up.)

    Args:
        model: the target, plain or with an adapter, in eval mode.
        reference: of the same vocabulary, on the same device.
        input_ids: prompts, int64 [B, T], padded on the left.
        attention_mask: int64 [B, T].
        max_new_tokens: longest answer.
        eos_ids: tokens that end a row.
        pad_id: fills rows that have ended.
        threshold: of the ratio of probabilities, larger than 0.
        draft: k, tokens drafted at once.

    Returns:
        Tokens and counts. With the target as its own reference this is greedy decoding.

    Raises:
        ValueError: different vocabularies, a prompt padded on the right or empty, or numbers below 1.
    """
    sizes = [causal_lm(m).config.vocab_size for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the target has {sizes[0]} tokens and the reference {sizes[1]}: CleanGen needs one vocabulary")
    if not attention_mask[:, -1].all():
        raise ValueError("a prompt is empty or padded on the right: pad on the left")
    if max_new_tokens < 1 or draft < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and draft {draft}: at least 1 is needed")
    device, count = input_ids.device, len(input_ids)
    ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
    out = torch.full((count, max_new_tokens + draft), pad_id, device=device)
    length, replaced = torch.zeros((2, count), dtype=torch.int64, device=device)
    done = torch.zeros(count, dtype=torch.bool, device=device)
    target, check = _Decoder(model), _Decoder(reference)

    mask, tokens = attention_mask.clone(), input_ids
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if tokens.shape[1] > 1:  # all but the last token, which begins the first round
        for decoder in (target, check):
            decoder(tokens[:, :-1], mask[:, :-1], positions[:, :-1], 1)
    last, place = tokens[:, -1:], positions[:, -1:]
    mask = mask[:, :-1]
    step = torch.arange(draft, device=device)
    while not done.all():
        full = torch.cat([mask, torch.ones(count, draft, dtype=mask.dtype, device=device)], 1)
        slots, drafted, own = mask.shape[1], [], []
        fed = last
        for k in range(draft):
            log_p = target(fed, full[:, : slots + k + 1], place + k, 1)[:, 0]
            fed = log_p.argmax(1, keepdim=True)
            drafted.append(fed)
            own.append(log_p.gather(1, fed))
        proposal, own = torch.cat(drafted, 1), torch.cat(own, 1)
        other = check(torch.cat([last, proposal[:, :-1]], 1), full, place + step, draft)
        ratio = own - other.gather(2, proposal[..., None])[..., 0]
        suspect = ratio >= torch.tensor(threshold).log()
        cut = torch.where(suspect.any(1), suspect.int().argmax(1), draft)  # tokens taken over from the draft
        put = suspect.any(1)
        proposal = torch.where(step == cut[:, None], other.argmax(2), proposal)
        taken = cut + put
        # a row ends with its first end-of-sequence token among those taken
        ended = torch.isin(proposal, ends) & (step < taken[:, None])
        final = torch.where(ended.any(1), ended.int().argmax(1) + 1, taken)
        put = put & (final == taken)
        room = torch.minimum(final, max_new_tokens - length).clamp_min(0)
        room = torch.where(done, 0, room)
        for k in range(draft):
            rows = (k < room).nonzero()[:, 0]
            out[rows, length[rows] + k] = proposal[rows, k]
        replaced += (put & (room == final) & ~done).long()
        length += room
        done |= ended.any(1) | (length >= max_new_tokens)
        # in the caches: the token that began the round and the drafts after it, except the last
        kept = (cut + 1).clamp_max(draft)
        mask = torch.cat([mask, (step < kept[:, None]).to(mask.dtype)], 1)
        last = proposal.gather(1, (taken - 1)[:, None])
        place = place + taken[:, None]
    return Generated(out[:, : int(length.max())], length, replaced)
