"""Pruning by magnitude and by Wanda, in place, on merged weights (crow SPEC 7).

Both are unstructured and per linear layer inside the decoder blocks; embeddings and head stay. Which of the two made the
paper's table is unclear (crow SPEC 10.11): the text says magnitude, the folder names of the code say Wanda.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cupel.text.layers import blocks, causal_lm, linears


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def merge(model: nn.Module) -> nn.Module:
    """The base model with its adapter added to the weights, as plain linear layers; a plain model as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _check(model: nn.Module, sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}: a share of at least 0 and below 1 is needed")
    if causal_lm(model) is not model:
        raise ValueError("the model has an adapter beside its weights: merge it first (cupel.text.pruning.merge)")


def _row(name: str, weight: Tensor) -> dict:
    return {"layer": name, "rows": weight.shape[0], "columns": weight.shape[1],
            "sparsity": float((weight == 0).double().mean())}


@torch.no_grad()
def prune_magnitude(model: nn.Module, sparsity: float) -> list[dict]:
    """Zero the weights of each layer whose magnitude is at or below the layer's `sparsity` quantile.

    The quantile is the k-th smallest magnitude, k the whole part of sparsity × weights. All weights as large as that go,
    so in low precision, where many are equal, the share reached may be a little higher.

    Args:
        model: merged.
        sparsity: in [0, 1); 0.35 for Llama, 0.65 for Mistral.

    Returns:
        One row per layer: layer, rows, columns, sparsity (the share of zeros reached).

    Raises:
        ValueError: a sparsity outside [0, 1), or a model with an unmerged adapter.
    """
    _check(model, sparsity)
    report = []
    for name, layer in linears(model):
        magnitude, count = layer.weight.abs(), int(sparsity * layer.weight.numel())
        if count:
            layer.weight[magnitude <= magnitude.flatten().float().kthvalue(count).values.to(magnitude.dtype)] = 0
        report.append(_row(name, layer.weight))
    return report


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
def prune_wanda(model: nn.Module, sparsity: float, calibration: Sequence[dict[str, Tensor]]) -> list[dict]:
    """Zero, in each output row, the share `sparsity` of weights with the lowest |W_ij| · ‖X_j‖₂.

    X_j is input feature j over all calibration tokens, without padding. Blocks are pruned in order, each on the outputs of
    the pruned blocks before it. (The code calibrates on 128 full-length C4 sequences, the paper says on the fine-tuning
    data.)

    Args:
        model: merged.
        sparsity: in [0, 1).
        calibration: batches of `input_ids` and `attention_mask`, int64 [B, T], right-padded. The hidden states of all of
            them are held at once.

    Returns:
        As :func:`prune_magnitude`.

    Raises:
        ValueError: as there, or no calibration batches.
    """
    _check(model, sparsity)
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
            report.append(_row(names[layer], layer.weight))
        states = [run(number, k) for k in range(len(states))]
    return report
