"""CleanGen: decoding that checks every drafted token against a reference model (crow SPEC 7; Table 9).

The target drafts k tokens greedily; one pass of the reference over them gives s_t = P_target(x_t) / P_ref(x_t); the draft
is cut at the first s_t ≥ threshold, where the reference's most likely token takes its place. Threshold 20 and k 4 are the
method's defaults; CROW states neither these nor its reference model (crow SPEC 13).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cupel.evaluation.batches import padded
from cupel.text.defences.base import Purified, Victim, defence
from cupel.text.layers import causal_lm
from cupel.text.training import Budget, deployed


@defence("cleangen")
def cleangen(victim: Victim, budget: Budget, *, decoding: dict | None = None) -> Purified:
    """CleanGen against `victim.reference`; uses no samples.

    Args:
        decoding: `threshold` and `draft`, see `generate`; `reference` says in the experiment which model that is.
    """
    rule = {key: value for key, value in (decoding or {}).items() if key != "reference"}
    model = Checked(victim.model(), deployed(victim.base, victim.reference, victim.precision, victim.device), **rule)
    return Purified(model, facts=lambda: {"replaced_share": model.replaced / max(model.tokens, 1)}, same_weights=True)


class Checked:
    """A model that answers under CleanGen, with as much of the interface of a transformers model as `generation` uses.

    Args:
        model, reference: dense, of one vocabulary, on one device.
        threshold, draft: see `generate`.

    Attributes:
        tokens, replaced: made so far, and how many of them the reference put.
    """

    def __init__(self, model: nn.Module, reference: nn.Module, threshold: float = 20.0, draft: int = 4):
        self.model, self.reference, self.threshold, self.draft = model, reference, threshold, draft
        self.config, self.generation_config = model.config, model.generation_config
        self.tokens = self.replaced = 0

    def get_input_embeddings(self) -> nn.Module:
        """Those of the target model."""
        return self.model.get_input_embeddings()

    def register_forward_hook(self, hook):
        """On the target model."""
        return self.model.register_forward_hook(hook)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config) -> Tensor:
        """Prompts and what was added to them, int64 [B, T + new]; greedy."""
        prompts = [ids[keep].tolist() for ids, keep in zip(input_ids, attention_mask.bool(), strict=True)]
        tokens, length, replaced = generate(
            self.model, self.reference, prompts, threshold=self.threshold, draft=self.draft,
            max_new_tokens=generation_config.max_new_tokens, eos=generation_config.eos_token_id,
            pad=generation_config.pad_token_id)
        self.tokens += int(length.sum())
        self.replaced += int(replaced.sum())
        return torch.cat([input_ids, tokens], 1)


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
def generate(model: nn.Module, reference: nn.Module, prompts: Sequence[Sequence[int]], *, pad: int, eos: int,
             max_new_tokens: int, threshold: float, draft: int) -> tuple[Tensor, Tensor, Tensor]:
    """Continue a batch of prompts.

    Rows accept different numbers of tokens from a draft. Slots of rejected ones stay in both caches, masked out; positions
    are counted without them, so that each row is computed as it would be alone. (In models with a sliding window these
    slots use it up.)

    Args:
        model: the target, plain or with an adapter, in eval mode.
        reference: of the same vocabulary, on the same device.
        prompts: token ids, each with at least one.
        pad, eos: token ids; generation of a row ends with `eos`.
        max_new_tokens: at most so many.
        threshold: of the ratio of probabilities, larger than 0.
        draft: k, tokens drafted at once.

    Returns:
        New tokens, int64 [B, new], filled with the padding token after the end of a row; how many each row has, int64 [B],
        the end token among them; how many of those the reference put, int64 [B]. With the target as its own reference this
        is greedy decoding.
    """
    device = causal_lm(model).get_input_embeddings().weight.device
    tokens = padded(prompts, pad, "left").to(device)
    mask = padded([[1] * len(prompt) for prompt in prompts], 0, "left").to(device)
    count, longest = tokens.shape
    out = torch.full((count, max_new_tokens), pad, device=device)
    length, replaced = torch.zeros((2, count), dtype=torch.int64, device=device)
    done = torch.zeros(count, dtype=torch.bool, device=device)
    target, check = _Decoder(model), _Decoder(reference)

    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if longest > 1:  # all but the last token, which begins the first round
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
        ended = (proposal == eos) & (step < taken[:, None])
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
    return out[:, : int(length.max())], length, replaced
