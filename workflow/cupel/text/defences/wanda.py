"""Wanda: pruning by magnitude times the norm of the input feature, on merged weights (Sun et al., 2024; crow SPEC 7, 10.11)."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cupel.text.data.prompts import Collator, by_length
from cupel.text.defences.base import Purified, Victim, defence
from cupel.text.defences.magnitude import check, row
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


@contextlib.contextmanager
def _norms(block: nn.Module, mask: list[Tensor]) -> Iterator[dict[nn.Module, Tensor]]:
    """Sums of squares of each input feature of each linear layer over the tokens, float32 [columns]; filled by passes.

    `mask` is a list of one bool [B, T], replaced by the caller from batch to batch.
    """
    sums: dict[nn.Module, Tensor] = {}

    def hook(module, args, output):
        found = args[0][mask[0]].float().square().sum(0)
        sums[module] = sums[module] + found if module in sums else found

    handles = [module.register_forward_hook(hook) for module in block.modules() if isinstance(module, nn.Linear)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def prune(model: nn.Module, calibration: Sequence[dict[str, Tensor]], sparsity: float) -> list[dict]:
    """Zero, in each output row, the share `sparsity` of weights with the lowest |W_ij| · ‖X_j‖₂, in place.

    X_j is input feature j over all calibration tokens, without padding. Blocks are pruned in order, each on the outputs of
    the pruned blocks before it.

    Args:
        model: merged.
        calibration: batches of `input_ids` and `attention_mask`, int64 [B, T], right-padded. The hidden states of all of
            them are held at once.
        sparsity: in [0, 1).

    Returns:
        As `magnitude.prune`.

    Raises:
        ValueError: as there, or no calibration batches.
    """
    check(model, sparsity)
    if not calibration:
        raise ValueError("Wanda needs calibration batches")
    decoder, layers = model.get_decoder(), blocks(model)
    device = model.get_input_embeddings().weight.device
    # what each block gets beside the hidden states (positions, masks) does not depend on the weights: noted once
    given: list[list[tuple[tuple, dict]]] = []
    for batch in calibration:
        calls: list[tuple[tuple, dict]] = []

        def note(module, args, kwargs, calls=calls):
            # only the first block's states are used
            calls.append((args if not calls else (None, *args[1:]), kwargs))
            if len(calls) == len(layers):
                raise _Stop

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            with contextlib.suppress(_Stop):
                decoder(input_ids=batch["input_ids"].to(device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        given.append(calls)
    states = [calls[0][0][0] for calls in given]
    masks = [batch["attention_mask"].bool().to(device) for batch in calibration]

    def run(number: int, k: int) -> Tensor:
        args, kwargs = given[k][number]
        output = layers[number](states[k], *args[1:], **kwargs)
        return output[0] if isinstance(output, tuple) else output

    names = {layer: name for name, layer in linears(model)}
    report = []
    for number, block in enumerate(layers):
        mask = [masks[0]]
        with _norms(block, mask) as sums:
            for k in range(len(states)):
                mask[0] = masks[k]
                run(number, k)
        for layer, squares in sums.items():
            score = layer.weight.abs().float() * squares.sqrt()
            lowest = score.argsort(dim=1, stable=True)[:, : int(sparsity * score.shape[1])]
            layer.weight.scatter_(1, lowest, 0.0)
            report.append(row(names[layer], layer.weight))
        states = [run(number, k) for k in range(len(states))]
    return report
