"""Wanda: pruning by magnitude times the norm of the input feature, on merged weights (Sun et al., 2024; crow SPEC 7, 10.11)."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cupel.evaluation.batches import by_length
from cupel.text.data.prompts import Collator
from cupel.text.defences.base import Purified, Victim, defence
from cupel.text.defences.magnitude import row
from cupel.text.layers import blocks, linears
from cupel.text.training import Budget

#: samples of a calibration batch
BATCH_SIZE = 8


@defence("wanda")
def wanda(victim: Victim, budget: Budget, *, pruning: dict) -> Purified:
    """Wanda, calibrated on the defender's samples, as the paper says (the code has 128 full-length C4 sequences).

    Args:
        pruning: `sparsity`.
    """
    collate, model = Collator(budget.pad), victim.model()
    batches = [collate([budget.samples[k] for k in rows]) for rows in by_length(budget.samples.lengths, BATCH_SIZE)]
    return Purified(model, prune(model, batches, **pruning))


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def _squares(model: nn.Module, block: nn.Module, calibration: Sequence[dict[str, Tensor]]) -> dict[nn.Module, Tensor]:
    """Sums of squares of each input feature of each linear layer of a block over all tokens, float32 [columns]."""
    device, sums, mask = model.get_input_embeddings().weight.device, {}, None

    def note(layer, args, output):
        sums[layer] = sums.get(layer, 0.0) + args[0][mask].float().square().sum(0)

    def stop(*_):
        raise _Stop

    with contextlib.ExitStack() as hooks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                hooks.enter_context(layer.register_forward_hook(note))
        hooks.enter_context(block.register_forward_hook(stop))
        for batch in calibration:
            mask = batch["attention_mask"].bool().to(device)
            with contextlib.suppress(_Stop):
                model.get_decoder()(input_ids=batch["input_ids"].to(device), use_cache=False)
    return sums


@torch.no_grad()
def prune(model: nn.Module, calibration: Sequence[dict[str, Tensor]], sparsity: float) -> list[dict]:
    """Zero, in each output row, the share `sparsity` of weights with the lowest |W_ij| · ‖X_j‖₂, in place; rows as `magnitude`.

    X_j is input feature j over all calibration tokens, without padding. Blocks are pruned in order, each on the outputs of
    the pruned blocks before it, which are run again for that: half as many forward passes as there are blocks.

    Args:
        model: merged.
        calibration: batches of `input_ids` and `attention_mask`, int64 [B, T], right-padded.
        sparsity: in [0, 1).
    """
    names = {layer: name for name, layer in linears(model)}
    report = []
    for block in blocks(model):
        for layer, squares in _squares(model, block, calibration).items():
            score = layer.weight.abs().float() * squares.sqrt()
            lowest = score.argsort(dim=1, stable=True)[:, : int(sparsity * score.shape[1])]
            layer.weight.scatter_(1, lowest, 0.0)
            report.append(row(names[layer], layer.weight))
    return report
