"""The parts of a decoder of transformers: blocks, their linear layers, the hidden states between them."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft model (its layers carry the adapters), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks.

    Raises:
        ValueError: the decoder keeps no list of `num_hidden_layers` blocks.
    """
    inner = causal_lm(model)
    count = inner.config.num_hidden_layers
    for child in inner.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(f"{type(inner).__name__} has no list of {count} decoder blocks: only dense decoders can be used here")


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every linear layer inside the blocks; adapters' own layers are left out."""
    names = {module: name for name, module in model.named_modules()}
    for module in blocks(model).modules():
        if isinstance(module, nn.Linear) and not {"lora_A", "lora_B"} & set(names[module].split(".")):
            yield names[module], module


@contextlib.contextmanager
def captured(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that each forward pass fills with H⁰..H^N, [B, T, d] in the model's dtype, gradients attached.

    H⁰ goes into the first block, H^l comes out of block l, H^N before the final norm. (`hidden_states` of transformers
    holds the normed one in its place.)
    """
    states: list[Tensor] = []

    def before(module, args):
        states[:] = [args[0]]

    def after(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    layers = blocks(model)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(before))
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(after))
        yield states
