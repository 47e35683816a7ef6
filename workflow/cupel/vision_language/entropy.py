"""Entropy of the attention from the last prompt position to the image tokens (BYE Eqs. 4, 5; bye SPEC 2.3, 2.4, 11.2).

One row of each layer's attention map is all that is needed. It is computed where the layer hands its queries and keys to
`scaled_dot_product_attention`, so no map of S x S is made, and nothing is computed twice.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cupel.compat import ensure_torchvision
from cupel.vision_language.models import Encoder, VisionLanguageModel, inference
from cupel.vision_language.streaming import stream

ensure_torchvision()

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

#: inside the logarithm (official code)
EPSILON = 1e-8
#: under which transformers knows the attention that leaves its rows
NAME = "cupel_rows"


class Read(Exception):
    """The last layer's attention is known: nothing that comes after it is wanted."""


def last_row(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """Attention weights of the last position, averaged over heads.

    Args:
        query: [B, heads, S, head size], with its positions.
        key: [B, groups, S, head size]; neighbouring heads share one.
        mask: bool [B, 1, S, S], what may be attended to; None: all that came before.
        scaling: of the scores.

    Returns:
        float32 [B, S]; rows sum to 1 over what may be attended to.
    """
    # heads that share a key stand side by side: [B, groups, heads per group, size] x [B, groups, size, S]
    scores = (query[:, :, -1].unflatten(1, (key.shape[1], -1)) @ key.transpose(-1, -2)).float() * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, -1:], float("-inf"))
    return scores.softmax(-1).flatten(1, 2).mean(1)


@contextlib.contextmanager
def attention_rows(model: VisionLanguageModel) -> Iterator[list[torch.Tensor]]:
    """Within the block, every pass of the language model leaves float32 [B, S], one for each decoder layer, in the list.

    The last layer ends the pass with `Read`.
    """
    rows, network, last = [], model.network, model.layers[-1].self_attn

    def attend(module, query, key, value, attention_mask, **settings):
        rows.append(last_row(query, key, attention_mask, settings["scaling"]))
        if module is last:
            raise Read
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)

    before = network.config.text_config._attn_implementation
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.set_attn_implementation({"text_config": NAME})
    try:
        yield rows
    finally:
        network.set_attn_implementation({"text_config": before})


def image_attention(model: VisionLanguageModel, batch: dict[str, torch.Tensor], rows: list[torch.Tensor]) -> torch.Tensor:
    """Distribution over the image tokens after each layer's head mean, renormalised (bye SPEC 2.3): float32 [B, L, T].

    Args:
        model: in eval mode.
        batch: of `Encoder`, prompts without answers.
        rows: of `attention_rows`.
    """
    rows.clear()
    with contextlib.suppress(Read):
        model.network.model(**batch, use_cache=False)
    image = batch["input_ids"] == model.network.config.image_token_id
    picked = torch.stack([row[image].view(len(row), -1) for row in rows], 1)
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
    with attention_rows(model) as rows:
        def compute(batch: dict) -> list[dict]:
            p = image_attention(model, batch, rows)
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
    with inference(model), attention_rows(model) as rows:
        return image_attention(model, encoder.batch(range(len(records))), rows).unflatten(-1, (side, side)).cpu().numpy()
