"""4-bit NormalFloat quantisation of linear layers, by bitsandbytes or simulated (crow SPEC 7).

The paper's "INT4" is bitsandbytes' NF4 with double quantisation of the base model, its adapter unquantised on top
(crow SPEC 10.12). `nf4_simulated` rounds the weights to the same code book and back, so it needs no GPU and no kernels: the
numbers the model computes with are quantised, its size and speed are not.
"""

from functools import cache

import torch
from torch import Tensor, nn

from cupel.text.defences.base import Purified, Victim, defence
from cupel.text.layers import linears
from cupel.text.training import Budget, deployed, load_adapter

BLOCK, NESTED_BLOCK = 64, 256
# mean of the largest quantile levels of 15 and 16 equal shares, so that neither side of the code book gets an infinite end
OFFSET = 0.5 * (2 - 1 / 30 - 1 / 32)


@defence("nf4")
def nf4(victim: Victim, budget: Budget, *, quantisation: dict | None = None) -> Purified:
    """NF4; uses no samples.

    Args:
        quantisation: `backend` and `double`, see `quantise`; `merged`: quantise the adapter too (False: the base model
            alone, with the adapter on top, as the code does).
    """
    setting = {"backend": "nf4_simulated", "double": True, "merged": False} | (quantisation or {})
    model = victim.model() if setting["merged"] else deployed(victim.base, None, victim.precision, victim.device)
    report = quantise(model, setting["backend"], setting["double"])
    if not setting["merged"]:
        model = load_adapter(model, victim.adapter, trainable=False)
        if setting["backend"] == "nf4_simulated":  # rounded weights are plain ones: the adapter can be added to them
            model = model.merge_and_unload()
    return Purified(model.eval(), report)


@cache
def nf4_levels() -> Tensor:
    """The 16 levels, float32, ascending from −1 to 1: quantiles of the normal distribution, zero among them.

    Eight levels above zero and seven below are equally spaced in probability between 1/2 and `OFFSET`, each side scaled
    by the largest (QLoRA, Dettmers et al. 2023).
    """
    def side(count: int) -> Tensor:
        probability = torch.linspace(OFFSET, 0.5, count + 1, dtype=torch.float64)[:-1]
        return torch.distributions.Normal(0.0, 1.0).icdf(probability)

    above, below = side(8), side(7)
    levels = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.abs().max()).float()


@cache
def dynamic_levels() -> Tensor:
    """The 256 levels of bitsandbytes' 8-bit dynamic code, float32, ascending, −0.993 to 1.

    Seven decades; the k-th holds 2^k levels of either sign, the middles of as many equal parts of [0.1, 1] · 10^(k−6);
    then 0 and 1.
    """
    levels = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for k in range(7):
        edges = torch.linspace(0.1, 1.0, 2**k + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (k - 6)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values.float()


def _blocks_of(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows of `size` of the flattened values, the last filled with zeros, and the largest magnitude of each."""
    flat = values.flatten()
    rows = nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    return rows, rows.abs().amax(1, keepdim=True)


def _nearest(rows: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """rows / scale rounded to the nearest level; a block of zeros stays zero."""
    middles = (levels[1:] + levels[:-1]) / 2
    index = torch.bucketize(torch.where(scale > 0, rows / scale, 0.0).contiguous(), middles.to(rows.device))
    return levels.to(rows.device)[index]


def rounded(weight: Tensor, double: bool = True) -> Tensor:
    """Quantise and dequantise.

    Args:
        weight: float, any shape. Blocks are 64 consecutive entries in row-major order, scaled by their largest magnitude.
        double: quantise the scales too: less their mean, in blocks of 256, to the 8-bit dynamic code.

    Returns:
        The values that a layer would compute with, in the dtype of `weight`.
    """
    rows, scale = _blocks_of(weight.detach().float(), BLOCK)
    codes = _nearest(rows, scale, nf4_levels())
    if double:
        mean = scale.mean()
        nested, largest = _blocks_of(scale - mean, NESTED_BLOCK)
        scale = (_nearest(nested, largest, dynamic_levels()) * largest).flatten()[: len(scale), None] + mean
    return (codes * scale).flatten()[: weight.numel()].view(weight.shape).to(weight.dtype)


@torch.no_grad()
def quantise(model: nn.Module, backend: str = "nf4_simulated", double: bool = True) -> list[dict]:
    """Quantise every linear layer inside the decoder blocks, in place.

    An adapter on top stays as it is: that is the code's way, base only. For the other reading merge it first.

    Args:
        model: plain or with an adapter. `nf4_bitsandbytes` quantises where the model is, meant for a GPU: the CPU kernels
            of bitsandbytes 0.50 are wrong for layers whose width is not a multiple of 64.
        backend: `nf4_simulated` or `nf4_bitsandbytes`, which computes in the weights' dtype.
        double: also quantise the scales.

    Returns:
        One row per layer: layer, error (root mean square of the change over that of the weights).

    Raises:
        ImportError: bitsandbytes is asked for and not installed.
    """
    report = []
    for name, layer in list(linears(model)):
        before = layer.weight.float()
        after = rounded(layer.weight, double) if backend == "nf4_simulated" else _replace(model, name, layer, double)
        report.append({"layer": name, "error": float((after.float() - before).norm() / before.norm())})
        if backend == "nf4_simulated":
            layer.weight.copy_(after)
    return report


def _replace(model: nn.Module, name: str, layer: nn.Linear, double: bool) -> Tensor:
    """Put a 4-bit layer in the place of `layer`; returns its weights as it computes with them."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError("nf4_bitsandbytes needs the package bitsandbytes (extra `gpu` of cupel); "
                          "nf4_simulated rounds to the same levels without it") from error
    weight = layer.weight.detach()
    new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=weight.dtype,
                            compress_statistics=double, quant_type="nf4", device="meta")
    new.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, compress_statistics=double, quant_type="nf4")
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().cpu(), requires_grad=False)
    new = new.to(weight.device).eval()
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, new)
    return bnb.functional.dequantize_4bit(new.weight.data, new.weight.quant_state)
