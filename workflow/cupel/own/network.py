"""A network of the user in the form that defences know: a wrapper that takes pixels, its parts found by looking at one pass.

The network is not changed, and its keys stay its own: what a defence makes of it is `Own.network`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.images.defences.passes import watched
from cupel.images.models.classifier import Normalize


@dataclass(frozen=True)
class Found:
    """Names of the parts of a network, inside it.

    Attributes:
        classes: K, the number of logits.
        head: the linear layer that gives the logits; empty where there is none.
        hidden: other linear layers behind the last convolution, in the order of the pass.
        stages: last modules whose outputs are feature maps [B, c, h, w] of a size, for the last three sizes.
    """

    classes: int
    head: str
    hidden: tuple[str, ...]
    stages: tuple[str, ...]


def logits_of(output) -> Tensor:
    """The logits in what a network returns: a tensor, or `logits` of what transformers' models return.

    Raises:
        ValueError: something else, or no float [B, K].
    """
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the network returns {what}; a classifier that returns logits [images, classes] is needed: wrap it "
                         "in a module of yours that returns them")
    return output


def look(network: nn.Module, x: Tensor, head: str = "") -> Found:
    """Find the parts of a network in one pass over normalised images [B, C, H, W]; it is left in eval mode.

    Args:
        head: name of the layer to take for the head; empty: the linear layer whose output is the network's.

    Raises:
        ValueError: it gives no logits, or `head` is no such layer; probabilities are no logits.
    """
    modules = {} if isinstance(network, torch.jit.ScriptModule) else {name: m for name, m in network.named_modules() if name}
    outputs, calls = {}, Counter()

    def note(name, output):
        calls[name] += 1
        outputs.pop(name, None)  # the order is that of the last call
        outputs[name] = output

    with torch.no_grad(), watched(modules, note):
        network.eval()
        logits = logits_of(network(x))
    if len(x) != len(logits):
        raise ValueError(f"the network returns {len(logits)} rows of logits for {len(x)} images")
    if logits.min() >= 0 and torch.allclose(logits.sum(1), torch.ones(len(x), device=x.device), atol=1e-3):
        raise ValueError("the network returns probabilities and not logits: take the softmax off its end")

    def gives_logits(name: str) -> bool:  # up to a constant an image, which a log-softmax takes off
        output = outputs.get(name)
        if not isinstance(modules[name], nn.Linear) or not isinstance(output, Tensor) or output.shape != logits.shape:
            return False
        away = output - logits
        return torch.allclose(away, away[:, :1].expand_as(away), atol=1e-3 * float(logits.abs().max().clamp_min(1)))

    heads = [name for name in outputs if gives_logits(name)]
    if head and head not in heads:
        raise ValueError(f"{head!r} is not a linear layer whose output is the network's; "
                         + (f"such are {', '.join(heads)}" if heads else "there is none in this network"))
    head = head or (heads[-1] if heads else "")
    order = list(outputs)
    last = max((k for k, name in enumerate(order) if isinstance(modules[name], nn.Conv2d)), default=-1)
    flat = {name for name, output in outputs.items() if isinstance(output, Tensor) and output.ndim == 2}
    hidden = tuple(name for name in order[last + 1:] if isinstance(modules[name], nn.Linear) and name in flat - {head})
    maps = {tuple(output.shape[2:]): name for name, output in outputs.items() if calls[name] == 1
            and isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1}
    return Found(logits.shape[1], head, hidden if head else (), tuple(maps.values())[-3:])


def usual_order(tensor: Tensor) -> Tensor:
    """A copy that no operation takes for channels last, as it does one channel whose strides leave that open."""
    return tensor.clone(memory_format=torch.contiguous_format)


class Own(nn.Module):
    """A network of the user with the attributes of `cupel.images.models.Classifier`, as far as it has them.

    Args:
        network: normalised images float [B, C, H, W] to logits [B, K].
        normalize: pixels in [0, 1] to what `network` takes.
        found: its parts.
        image_size: side of the images.

    Memory is in torch's usual order and not channels last as elsewhere: `view` behind a convolution fails on that.
    """

    def __init__(self, network: nn.Module, normalize: Normalize, found: Found, image_size: int) -> None:
        super().__init__()
        self.normalize, self.network, self.found = normalize, network, found
        self.attachments = nn.ModuleList()
        self.hidden_linears = tuple(f"network.{name}" for name in found.hidden)
        self.spec = {"name": type(network).__name__, "image_size": image_size, "in_channels": len(normalize.mean)}

    @property
    def head(self) -> nn.Linear:
        """The linear layer that gives the logits.

        Raises:
            ValueError: the network has none.
        """
        if not self.found.head:
            raise ValueError("it works on the last linear layer, and in this network no linear layer gives the logits")
        return self.network.get_submodule(self.found.head)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the last modules whose outputs are feature maps.

        Raises:
            ValueError: the network has none.
        """
        if not self.found.stages:
            raise ValueError("it works on feature maps, and no module of this network has any as output")
        return tuple(f"network.{name}" for name in self.found.stages)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # with it, `to` of whatever the network is part of
        for parameter in self.network.parameters():
            parameter.data = usual_order(parameter.data)
        return self

    def features(self, x: Tensor) -> Tensor:
        """What the head reads, float [B, d], of pixels [B, C, H, W] in [0, 1]."""
        seen = {}
        with watched({"head": self.head}, lambda name, value: seen.update({name: value}), inputs=True):
            self(x)
        return seen["head"]

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float [B, K], of pixels [B, C, H, W] in [0, 1]."""
        return logits_of(self.network(usual_order(self.normalize(x))))


def per_channel(values: Sequence[float], channels: int, what: str) -> list[float]:
    """One value a channel.

    Raises:
        ValueError: there are several, but not as many as channels.
    """
    if len(values) not in (1, channels):
        raise ValueError(f"{what} has {len(values)} values, and the images have {channels} channels")
    return [float(value) for value in values] * (channels // len(values))


def wrap(network: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float], head: str = "") -> Own:
    """Wrap a network, which is moved to float32 and to the device of the images.

    Args:
        images: pixels float [B, C, H, W] in [0, 1], two or more.
        mean, std: of the normalisation, one value or one a channel.
        head: see `look`.

    Raises:
        ValueError: see `look`; or the network does not take images of this form.
    """
    normalize = Normalize(*(per_channel(values, images.shape[1], what) for values, what in ((mean, "mean"), (std, "std"))))
    network = network.to(images.device, torch.float32)
    if odd := [name for name, value in network.state_dict().items() if not value.isfinite().all()]:
        raise ValueError(f"the weights are not all finite numbers, first {odd[0]}: nothing can be measured on such a network")
    if not min(std) > 0:
        raise ValueError(f"std {min(std)}: standard deviations are positive")
    x = usual_order(normalize.to(images.device)(images))
    try:
        found = look(network, x, head)
    except RuntimeError as error:
        raise ValueError(f"the network does not take images of {images.shape[1]} channels and {images.shape[2]}×"
                         f"{images.shape[3]} pixels: {str(error).strip().splitlines()[-1]}") from None
    return Own(network, normalize, found, images.shape[-1])
