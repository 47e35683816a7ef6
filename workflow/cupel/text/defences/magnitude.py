"""Pruning by magnitude, on merged weights (crow SPEC 7).

It is unstructured and per linear layer inside the decoder blocks; embeddings and head stay. Whether it or Wanda made the
paper's table is unclear (crow SPEC 10.11): the text says magnitude, the folder names of the code say Wanda.
"""

import torch
from torch import Tensor, nn

from cupel.text.defences.base import Purified, Victim, defence
from cupel.text.layers import linears
from cupel.text.training import Budget


@defence("magnitude")
def magnitude(victim: Victim, budget: Budget, *, pruning: dict) -> Purified:
    """Magnitude pruning; uses no samples.

    Args:
        pruning: `sparsity`: 0.35 for Llama, 0.65 for Mistral.
    """
    model = victim.model()
    return Purified(model, prune(model, **pruning))


def row(name: str, weight: Tensor) -> dict:
    """A layer in the history: layer, rows, columns, sparsity (the share of zeros reached)."""
    return {"layer": name, "rows": weight.shape[0], "columns": weight.shape[1],
            "sparsity": float((weight == 0).double().mean())}


@torch.no_grad()
def prune(model: nn.Module, sparsity: float) -> list[dict]:
    """Zero the weights of each layer whose magnitude is at or below the layer's `sparsity` quantile, in place.

    The quantile is the k-th smallest magnitude, k the whole part of sparsity × weights. All weights as large as that go,
    so in low precision, where many are equal, the share reached may be a little higher.

    Args:
        model: merged.
        sparsity: in [0, 1).

    Returns:
        A `row` per layer.
    """
    report = []
    for name, layer in linears(model):
        size, count = layer.weight.abs(), int(sparsity * layer.weight.numel())
        if count:
            layer.weight[size <= size.flatten().float().kthvalue(count).values.to(size.dtype)] = 0
        report.append(row(name, layer.weight))
    return report
