"""BatchNorm statistics based pruning (Zheng et al., NeurIPS 2022); ims SPEC 7.

The running statistics of a BatchNorm layer come from poisoned training data. Channels for which clean data look most
different carry the backdoor: with mean m and variance v of a channel's input in the clean batch, M and V the running
ones,

    D = w·log(V / v) + (v + (m − M)²) / (2V) − ½

and γ, β ← 0 where D exceeds mean + u·std of the layer. At w = ½ this is KL( N(m, v) ‖ N(M, V) ). The released code has
w = 1, the weight that the logarithm has where it is one of standard deviations, log(√V / √v); it decides which channels
go (ims SPEC 10.13). Only clean data are used, as in the IMS authors' port; the original takes a batch of the poisoned
training set.
"""

import torch
from torch import nn

from cupel.images.defences.base import defence
from cupel.images.defences.masks import layers, prune_outliers
from cupel.images.defences.passes import batches, watched


def divergence(mean: torch.Tensor, var: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor,
               log_weight: float) -> torch.Tensor:
    """D per channel, [C]."""
    tiny = torch.finfo(torch.float32).tiny  # dead channels have variance 0
    var, running_var = var.clamp_min(tiny), running_var.clamp_min(tiny)
    return log_weight * (running_var / var).log() + (var + (mean - running_mean) ** 2) / (2 * running_var) - 0.5


def input_statistics(model: nn.Module, norms: dict[str, nn.BatchNorm2d],
                     x: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and unbiased variance [C] of every BatchNorm's input, in eval mode, float64."""
    found = {}

    def note(name, values):
        values = values.double()
        found[name] = values.mean((0, 2, 3)), values.var((0, 2, 3))

    with torch.no_grad(), watched(norms, note, inputs=True):
        model.eval()(x)
    return found


@defence("bnp")
def bnp(victim, budget, rng, *, u=3.0, batch_size=256, log_weight=1.0):
    """BatchNorm statistics based pruning.

    Args:
        u: threshold in standard deviations; 4 on Tiny-ImageNet.
        batch_size: the statistics are those of the last, possibly partial, mini-batch of one augmented pass.
        log_weight: w; 1 as released, ½ for the Kullback-Leibler divergence.

    The history has one row per BatchNorm layer: layer, channels, pruned, threshold.

    Raises:
        ValueError: the network has no BatchNorm.
    """
    model = budget.copy_of(victim)
    norms = layers(model, nn.BatchNorm2d, "bnp")
    *_, (x, _) = batches(budget, batch_size, int(rng.integers(2**62)), 0)
    history = []
    for name, (mean, var) in input_statistics(model, norms, x).items():
        norm = norms[name]
        values = divergence(mean, var, norm.running_mean.double(), norm.running_var.double(), log_weight)
        history.append({"layer": name, **prune_outliers(model, name, values, u)})
    return model.eval(), history
