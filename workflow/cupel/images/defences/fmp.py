"""Adversarial Feature Map Pruning (Huang & Bu, ICML 2024), as in the IMS authors' BackdoorBench fork; ims SPEC 7.

For each convolution channel, a few clean images take one step of size ε that changes that channel's feature map most:

    x₀ = clamp(x + ε·sign(u)), u uniform around 0         x_c = clamp(x₀ + ε·sign ∇ ‖F_c(x₀) − F_c(x)‖²)

In each layer the 1/64 of channels whose x_c are classified worst are taken for the backdoor's and zeroed: filter, bias,
and γ, β of a BatchNorm that directly follows in module order. Then all weights are tuned.
"""

import itertools

import torch
from torch import nn

from cupel.images.defences.base import defence
from cupel.images.defences.masks import clamp_normalised, denormalise, layers, scale_batchnorms
from cupel.images.defences.passes import stage, train, watched
from cupel.rng import torch_rng
from cupel.training.engine import autocast, to_pixels, upload

GROUP = 8  # channels attacked in one pass; changes memory and speed only


def feature_map(model: nn.Module, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Output [B, C, h, w] of `layer` for pixels x."""
    found = {}
    with watched({"map": layer}, found.__setitem__):
        model(x)
    return found["map"]


def channel_accuracies(model: nn.Module, layer: nn.Conv2d, z: torch.Tensor, start: torch.Tensor, y: torch.Tensor, *,
                       eps: float, clamp: str, precision: str = "fp32") -> torch.Tensor:
    """Accuracy on x_c for every channel c of `layer`, [C].

    Args:
        model: in eval mode.
        z, start: x and x₀, normalised [B, C, H, W].
        eps, clamp: see `fmp`.
    """
    with torch.no_grad(), autocast(precision, z.device):
        clean = feature_map(model, layer, denormalise(model, z))
    found = []
    for channels in torch.arange(layer.out_channels, device=z.device).split(GROUP):
        moved = start.repeat(len(channels), 1, 1, 1).requires_grad_()
        with autocast(precision, z.device):
            maps = feature_map(model, layer, denormalise(model, moved)).unflatten(0, (len(channels), len(z)))
            # each copy of the images sees its own channel only, so one backward pass serves the whole group
            own = maps[torch.arange(len(channels), device=z.device), :, channels]
            loss = (own - clean[:, channels].transpose(0, 1)).float().square().sum()
        gradient = torch.autograd.grad(loss, moved)[0]
        with torch.no_grad(), autocast(precision, z.device):
            attacked = clamp_normalised(model, moved + eps * gradient.sign(), clamp)
            right = model(denormalise(model, attacked)).argmax(1).view(len(channels), -1) == y
        found.append(right.float().mean(1))
    return torch.cat(found)


@torch.no_grad()
def zero_channels(model: nn.Module, name: str, channels: torch.Tensor) -> None:
    """Zero filters (and biases) of convolution `name`, and γ, β of a BatchNorm that is the next module."""
    modules = dict(model.named_modules())
    convolution, following = modules[name], dict(itertools.pairwise(modules)).get(name)
    keep = torch.ones(convolution.out_channels, device=convolution.weight.device)
    keep[channels] = 0
    convolution.weight.mul_(keep.view(-1, 1, 1, 1))
    if convolution.bias is not None:
        convolution.bias.mul_(keep)
    if isinstance(modules.get(following), nn.BatchNorm2d):
        scale_batchnorms(model, {following: keep}, {following: keep})


@defence("fmp")
def fmp(victim, budget, rng, *, eps=1 / 255, samples=32, fraction=1 / 64, epochs=10, lr=0.01, momentum=0.9, lr_min=1e-4,
        batch_size=256, clamp="pixel"):
    """Adversarial feature map pruning.

    Args:
        eps: ε, in normalised units.
        samples: clean images attacked, drawn without augmentation; all where there are fewer.
        fraction: share of each layer's channels that is zeroed, rounded down.
        epochs, lr, momentum, lr_min, batch_size: of tuning by SGD without weight decay, cosine from lr to lr_min.
        clamp: `pixel`: to valid images; `normalised`: to [0, 1] after normalisation, as released.

    The network is in eval mode while channels are ranked; the released code leaves it in train mode.

    Raises:
        ValueError: the network has no convolutions.
    """
    model = budget.copy_of(victim).to(memory_format=torch.channels_last).eval()
    convolutions = layers(model, nn.Conv2d, "fmp")
    seed = int(rng.integers(2**62))
    chosen = rng.permutation(len(budget))[:samples]
    z = model.normalize(to_pixels(upload(budget.images[chosen], budget.device)))
    y = torch.as_tensor(budget.labels[chosen], device=z.device)
    coins = torch.randint(0, 2, z.shape, generator=torch_rng(seed, "start")).to(z)
    start = clamp_normalised(model, z + eps * (2 * coins - 1), clamp)
    history, doomed = [], {}
    work = budget.resume(doomed=doomed, history=history)
    for name, convolution in work.each(convolutions.items(), "rank"):
        scores = channel_accuracies(model, convolution, z, start, y, eps=eps, clamp=clamp, precision=budget.precision)
        doomed[name] = scores.argsort(stable=True)[: int(len(scores) * fraction)]
        history.append({"stage": "rank", "layer": name, "channels": len(scores), "pruned": len(doomed[name]),
                        "lowest": float(scores.min()), "mean": float(scores.mean())})
    for name, channels in doomed.items():
        zero_channels(model, name, channels)
    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=0.0, lr_min=lr_min)
    return model, history + stage("tune", train(model, budget, recipe, seed, title="fmp tune"))
