"""Channel masks: what the pruning defences share (ims SPEC 2.1 and 7).

IMS scales the outputs of convolutions; ANP, RNP, AWN and NFT learn one mask entry per BatchNorm channel and scale γ
(ANP also β); CLP and BNP set γ and β of outlying channels to zero. A mask over a whole network is one flat vector with
the layers one after another, so that an optimiser step on it is a handful of kernels whatever the depth.

A purified network carries no trace of its masks: they are multiplied into the values of its state_dict.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from cupel.images.defences.base import Budget
from cupel.training.augment import Draws, augment, to_pixels
from cupel.training.engine import predict


@dataclass(frozen=True)
class Channels:
    """Where the channels of each layer lie in a flat vector of N entries.

    Attributes:
        names: of the layers, in module order.
        sizes: channels of each layer.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """N."""
        return sum(self.sizes)

    def split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N] as views [C_l] by layer name."""
        return dict(zip(self.names, flat.split(self.sizes), strict=True))


def layers(model: nn.Module, kind: type[nn.Module], wanted_by: str) -> dict[str, nn.Module]:
    """Submodules of a kind by name, in module order.

    Raises:
        ValueError: there is none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not found:
        raise ValueError(f"{wanted_by} prunes channels of {kind.__name__} layers, and this network has none; "
                         f"choose a convolutional victim such as preactresnet18")
    return found


@torch.no_grad()
def write(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Set parameters or buffers of `model` by name."""
    state = model.state_dict()
    for name, value in tensors.items():
        state[name].copy_(value)


@torch.no_grad()
def scale_batchnorms(model: nn.Module, weight: dict[str, torch.Tensor], bias: dict[str, torch.Tensor] | None = None) -> None:
    """Multiply γ (and β) of BatchNorm layers by vectors [C_l] in place."""
    for part, scales in (("weight", weight), ("bias", bias or {})):
        for name, scale in scales.items():
            values = model.get_parameter(f"{name}.{part}")
            values.mul_(scale.to(values))


class MaskedBatchNorms(nn.Module):
    """A network whose BatchNorm weights are multiplied by one trainable mask [N], which starts at 1.

    The network's own parameters are frozen. Calling it takes pixels and gives logits, like the network.
    """

    def __init__(self, network: nn.Module, wanted_by: str):
        super().__init__()
        norms = layers(network, nn.BatchNorm2d, wanted_by)
        self.channels = Channels(tuple(norms), tuple(norm.num_features for norm in norms.values()))
        self.trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.network = network.requires_grad_(False)
        self.register_buffer("gamma", torch.cat([norm.weight.detach() for norm in norms.values()]), persistent=False)
        self.register_buffer("beta", torch.cat([norm.bias.detach() for norm in norms.values()]), persistent=False)
        self.mask = nn.Parameter(torch.ones_like(self.gamma))

    def forward(self, x: torch.Tensor, offset: torch.Tensor | float = 0.0,
                shift: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Logits with γ·(mask + offset) and β·(1 + shift) in place of γ and β."""
        tensors = {}
        for part, flat in (("weight", self.gamma * (self.mask + offset)), ("bias", self.beta * (1 + shift))):
            tensors |= {f"{name}.{part}": value for name, value in self.channels.split(flat).items()}
        return functional_call(self.network, tensors, (x,))

    def pruned(self, victim: nn.Module, keep: torch.Tensor) -> tuple[nn.Module, float]:
        """A copy of `victim` with γ at zero in all channels but those to `keep`, bool [N], and the share of zeros."""
        candidate = copy.deepcopy(victim).to(keep.device)
        scale_batchnorms(candidate, self.channels.split(keep))
        return candidate, 1 - int(keep.sum()) / self.channels.total

    def finish(self) -> nn.Module:
        """The network, in eval mode, with the mask multiplied into γ, and trainable as it was."""
        scale_batchnorms(self.network, self.channels.split(self.mask.detach()))
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        return self.network.eval()

    @torch.no_grad()
    def clamp(self, low: torch.Tensor | float = 0.0) -> None:
        """Bring the mask back into [low, 1]."""
        self.mask.clamp_(max=1).clamp_(min=low)


def prune_outliers(model: nn.Module, name: str, values: torch.Tensor, u: float) -> dict:
    """Zero γ and β of the channels of BatchNorm `name` whose values [C] are above mean + u·std of the layer (std with C − 1).

    No value can be more than (C − 1)/√C deviations above the mean: at u = 3 a layer of ten channels or fewer is never
    pruned.
    """
    threshold = values.mean() + u * values.std()
    keep = ~(values > threshold)
    scale_batchnorms(model, {name: keep}, {name: keep})
    return {"channels": len(keep), "pruned": int((~keep).sum()), "threshold": float(threshold)}


def accuracy(model: nn.Module, budget: Budget) -> float:
    """Accuracy on a budget, in eval mode, without augmentation; predictions in the budget's precision."""
    logits = predict(model, budget.images, device=budget.device, precision=budget.precision)
    return float((logits.argmax(1) == budget.labels).mean())


def augmented(images: torch.Tensor, index: torch.Tensor, budget: Budget, generator: torch.Generator) -> torch.Tensor:
    """Float pixels of `images[index]` with the budget's crop and flip, drawn from `generator` (on the CPU)."""
    draws = Draws.draw(len(index), budget.crop, budget.flip, generator, images.device)
    return augment(to_pixels(images[index]), budget.crop, draws.flip, draws.shift)


def clamp_normalised(model: nn.Module, z: torch.Tensor, space: str) -> torch.Tensor:
    """Clamp images z [B, C, H, W] that are already normalised.

    AWN and FMP perturb normalised images. The released ports clamp those to [0, 1] (`normalised`), which cuts off
    everything darker than the mean; `pixel` clamps to what is a valid image, [0, 1] before normalisation.
    """
    if space == "normalised":
        return z.clamp(0, 1)
    zero = torch.zeros_like(z[:1])
    return torch.minimum(torch.maximum(z, model.normalize(zero)), model.normalize(zero + 1))


def denormalise(model: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """Pixels of normalised images: the inverse of `model.normalize`."""
    return z * model.normalize.std + model.normalize.mean
