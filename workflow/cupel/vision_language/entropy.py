"""Entropy of the attention from the last prompt position to the image tokens (BYE Eqs. 4, 5; bye SPEC 2.3, 2.4, 11.2).

One row of each layer's attention map is all that is needed. A hook before each self-attention computes it from the
layer's own input and projections, so the network runs with any implementation of attention and no map of S x S is made.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from cupel.vision_language.models import Encoder, VisionLanguageModel, inference
from cupel.vision_language.streaming import stream

#: inside the logarithm (official code)
EPSILON = 1e-8


def last_row(attention: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
             mask: torch.Tensor) -> torch.Tensor:
    """Attention weights of the last position, averaged over heads.

    Args:
        attention: self-attention of Llama's kind (`q_proj`, `k_proj`, rotary positions, grouped keys, perhaps `q_norm`).
        hidden: its input [B, S, D].
        cos, sin: rotary embeddings [B or 1, S, head size].
        mask: [B, S], 0 at padding.

    Returns:
        float32 [B, S]; rows sum to 1 over what is no padding.

    Raises:
        NotImplementedError: a sliding window is shorter than the prompt.
    """
    window = getattr(attention, "sliding_window", None)
    if window and window < hidden.shape[1]:
        raise NotImplementedError(f"attention with a sliding window of {window} on {hidden.shape[1]} positions")
    size = attention.head_dim
    query = attention.q_proj(hidden[:, -1:]).unflatten(-1, (-1, size))
    key = attention.k_proj(hidden).unflatten(-1, (-1, size))
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query = rotate(query, query, cos[:, -1:], sin[:, -1:])[0]
    key = rotate(key, key, cos, sin)[0]
    # heads that share a key stand side by side: [B, groups, heads per group, size] x [B, groups, size, S]
    query = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    scores = (query @ key.transpose(-1, -2)).float() * attention.scaling
    scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
    return scores.softmax(-1).flatten(1, 2).mean(1)


@contextlib.contextmanager
def attention_rows(model: VisionLanguageModel) -> Iterator[dict]:
    """Within the block, every forward pass fills `rows`: a list of float32 [B, S], one per decoder layer.

    The caller puts the batch's attention mask under `mask` before each pass.
    """
    found: dict = {"mask": None, "rows": []}

    def before(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        found["rows"].append(last_row(module, hidden, cos, sin, found["mask"]))

    with contextlib.ExitStack() as hooks:
        for layer in model.layers:
            hooks.enter_context(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True))
        yield found


def image_attention(model: VisionLanguageModel, batch: dict[str, torch.Tensor], found: dict) -> torch.Tensor:
    """Distribution over the image tokens after each layer's head mean, renormalised (bye SPEC 2.3): float32 [B, L, T].

    Args:
        model: in eval mode.
        batch: of `Encoder`, prompts without answers.
        found: of `attention_rows`.
    """
    found["mask"], found["rows"] = batch["attention_mask"], []
    model.network.model(**batch, use_cache=False)
    image = batch["input_ids"] == model.network.config.image_token_id
    picked = torch.stack([row[image].view(len(row), -1) for row in found["rows"]], 1)
    return picked / picked.sum(-1, keepdim=True)


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats along the last axis, with the official ln(p + 1e-8)."""
    return -(p * (p + EPSILON).log()).sum(-1)


def tsallis(p: torch.Tensor) -> torch.Tensor:
    """Tsallis entropy of order 2 along the last axis, 1 − Σ p²: in [0, 1 − 1/T], no unit. The order is chosen here."""
    return 1 - p.square().sum(-1)


def extract(model: VisionLanguageModel, records: Sequence[dict], out: str | Path | None = None, *,
            batch_size: int | None = None) -> pd.DataFrame:
    """Attention entropies of all records.

    Args:
        model: fine-tuned, adapters merged.
        records, out, batch_size: see `stream`.

    Returns:
        `id` (str), `layer_0` ... `layer_{L-1}`: nats, float32, in [0, ln T], and `tsallis_0` ... NaN where attention was not
        finite.
    """
    with attention_rows(model) as found:
        def compute(batch: dict) -> list[dict]:
            p = image_attention(model, batch, found)
            columns = {f"{name}_{k}": values for name, measure in (("layer", entropy), ("tsallis", tsallis))
                       for k, values in enumerate(measure(p).T.tolist())}
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

        return stream(model, records, compute, out, run=("entropy", "tsallis"), batch_size=batch_size, dtype=np.float32,
                      title="entropy")


def heat_maps(model: VisionLanguageModel, records: Sequence[dict]) -> np.ndarray:
    """Distributions over the image for a few records, as float32 [N, L, rows, columns] (each map sums to 1).

    For LLaVA the map covers the image padded to a square, for InternVL the stretched image.
    """
    encoder = Encoder(model, records)
    side = round(model.image_tokens**0.5)
    with inference(model), attention_rows(model) as found:
        return image_attention(model, encoder.batch(range(len(records))), found).unflatten(-1, (side, side)).cpu().numpy()
