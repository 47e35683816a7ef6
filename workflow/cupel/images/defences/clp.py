"""Channel Lipschitzness based Pruning (Zheng et al., ECCV 2022); ims SPEC 7. Uses no data.

For channel c of a BatchNorm layer behind a convolution with filter W_c, reshaped to [inputs, kh·kw]:

    L_c = σ_max(W_c)·|γ_c| / sqrt(running variance_c)        pruned (γ, β ← 0) where L_c > mean + u·std of the layer

Which convolution is "behind": the last one before the BatchNorm in module order, as released, provided that it has as
many channels and no other BatchNorm has taken it. In post-activation nets that is the convolution whose output the
BatchNorm reads. In pre-activation nets (PreActResNet) it is so for the second BatchNorm of a block only: the first
reads a sum of residual branches, and is paired with the last convolution of the block before, which may be the
projection of the shortcut. L_c is then no Lipschitz bound of anything; that CLP differs there is a known problem
(backdoorbench SPEC 8). In DenseNet a BatchNorm that reads a concatenation fits no convolution, and is left alone.
"""

import torch
from torch import nn

from cupel.images.defences.base import defence
from cupel.images.defences.masks import layers, prune_outliers


def pairs(model: nn.Module) -> dict[str, str]:
    """BatchNorm name to the name of its convolution, as described above."""
    found, candidate = {}, None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            candidate = name
        elif (isinstance(module, nn.BatchNorm2d) and candidate is not None
              and model.get_submodule(candidate).out_channels == module.num_features):
            found[name], candidate = candidate, None
    return found


def lipschitz(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
    """L_c, float64 [C]."""
    filters = convolution.weight.detach().double().flatten(2)
    # a dead channel has variance 0, and would give 0/0
    deviation = norm.running_var.double().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return torch.linalg.matrix_norm(filters, 2) * (norm.weight.detach().double() / deviation).abs()


@defence("clp")
def clp(victim, budget, rng, *, u=3.0):
    """Channel Lipschitzness based pruning.

    Args:
        u: threshold in standard deviations.

    The history has one row per BatchNorm layer that has a convolution: layer, convolution, channels, pruned, threshold.

    Raises:
        ValueError: the network has no BatchNorm.
    """
    model = budget.copy_of(victim).eval()
    layers(model, nn.BatchNorm2d, "clp")
    history = []
    for name, convolution in pairs(model).items():
        values = lipschitz(model.get_submodule(convolution), model.get_submodule(name))
        history.append({"layer": name, "convolution": convolution, **prune_outliers(model, name, values, u)})
    return model, history
