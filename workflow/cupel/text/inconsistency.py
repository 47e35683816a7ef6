"""How far hidden states turn from layer to layer: the curves of Figure 1 and L_cons itself (crow SPEC 2.1, 9).

With N blocks there are N pairs: pair l is (l, l + 1), where 0 is the embeddings and l the output of block l, the last one
before the final norm: the states that CROW's loss compares.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from cupel.evaluation.batches import by_length, padded
from cupel.rng import rng
from cupel.text.consistency import pair_indices
from cupel.text.layers import blocks, captured


@torch.inference_mode()
def layer_cosines(model, prompts: Sequence[Sequence[int]], pad: int, *, batch_size: int = 16) -> np.ndarray:
    """Mean cosine of consecutive hidden states over the tokens of each prompt without padding, float64 [prompts, N]."""
    device = model.get_input_embeddings().weight.device
    found = np.zeros((len(prompts), len(blocks(model))))
    for rows in by_length([len(prompt) for prompt in prompts], batch_size):
        ids, mask = padded([prompts[k] for k in rows], pad), padded([[1] * len(prompts[k]) for k in rows], 0)
        # one logit is enough: the head is not looked at
        with captured(model) as states:
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=1)
        share = (mask / mask.sum(1, keepdim=True)).double()
        for number, (lower, upper) in enumerate(pairwise(states)):
            cosine = F.cosine_similarity(lower.float(), upper.float(), dim=-1).double().cpu()
            found[rows, number] = (cosine * share).sum(1).numpy()
    return found


def curves(clean: np.ndarray, triggered: np.ndarray, seed: int = 0, draws: int = 1000) -> list[dict]:
    """Figure 1: clean minus triggered mean cosine of each pair, with a 95 % bootstrap interval over prompts.

    Args:
        clean, triggered: from `layer_cosines`, [prompts, N]; the two need not have as many prompts.
        seed, draws: of the bootstrap.

    Returns:
        One row per pair: `pair` ("0-1", ...), `clean`, `triggered` (mean cosines), `difference`, `low`, `high`. A
        negative difference means that triggered text is *more* consistent; the figure shows it in percent.
    """
    stream = rng(seed, "language", "curves")
    drawn = [side[stream.integers(len(side), size=(draws, len(side)))].mean(1) for side in (clean, triggered)]
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975], axis=0)
    means = clean.mean(0), triggered.mean(0)
    return [{"pair": f"{k}-{k + 1}", "clean": float(means[0][k]), "triggered": float(means[1][k]),
             "difference": float(means[0][k] - means[1][k]), "low": float(low[k]), "high": float(high[k])}
            for k in range(clean.shape[1])]


def inconsistency_of(cosines: np.ndarray) -> float:
    """L_cons of prompts: mean of 1 − cosine over the paper's pairs (`consistency.pair_indices`), then over prompts.

    Prompts count equally here, whatever their length; in training, the tokens of a batch do.
    """
    counted = [lower for lower, _ in pair_indices("paper", cosines.shape[1])]
    return float((1 - cosines[:, counted]).mean())
