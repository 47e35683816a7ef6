"""Modules that a defence hangs onto a finished network, and that its checkpoint rebuilds.

Some defences do not change weights but add a module at one place of the network: a polarizer in front of a
convolution (NPD), an upper clamp behind a layer (MM-BD), a scale behind a block (masks on transformers). The network
keeps its own keys in `state_dict`; what is attached appears as `attachments.<n>.*`, and `cupel.images.models.save` writes
kind, place and shape of each, so that `cupel.images.models.load` hangs it back.
"""

import torch
from torch import Tensor, nn

from cupel.registry import one_of


class Attachment(nn.Module):
    """What all kinds share: the hook is a bound method, so that a deep copy of the network hooks its own copy.

    Attributes:
        kind: name of the class in checkpoints.
        before: it changes the input of its place, not the output.
        place: name of the module in the network.
        shape: sizes that build the attachment again.
    """

    kind: str
    before = False

    def __init__(self, place: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.place, self.shape = place, tuple(shape)

    def describe(self) -> dict:
        """JSON-able arguments of `attach`."""
        return {"kind": self.kind, "place": self.place, "shape": list(self.shape)}

    def on_input(self, host: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self(inputs[0]), *inputs[1:])

    def on_output(self, host: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self(output)


class Polarizer(Attachment):
    """BN(1x1 convolution) without bias in front of a convolution, float [B, c, h, w]; `shape` is (c,).

    It starts as the identity: unit weight, running mean 0 and variance 1.
    """

    kind, before = "polarizer", True

    def __init__(self, place: str, shape: tuple[int, ...]) -> None:
        super().__init__(place, shape)
        (channels,) = shape
        # the usual initialisation would draw from the global generator, only to be overwritten
        self.conv = nn.utils.skip_init(nn.Conv2d, channels, channels, 1, bias=False)
        nn.init.dirac_(self.conv.weight)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Clamp(Attachment):
    """min(x, bound) behind a module; `bound` has `shape`, which broadcasts to the output, and starts at infinity."""

    kind = "clamp"

    def __init__(self, place: str, shape: tuple[int, ...]) -> None:
        super().__init__(place, shape)
        self.bound = nn.Parameter(torch.full(self.shape, torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x, self.bound.to(x.dtype))


class Scale(Attachment):
    """x · factor behind a module; `factor` has `shape`, which broadcasts to the output, and starts at 1."""

    kind = "scale"

    def __init__(self, place: str, shape: tuple[int, ...]) -> None:
        super().__init__(place, shape)
        self.factor = nn.Parameter(torch.ones(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)


KINDS = {module.kind: module for module in (Polarizer, Clamp, Scale)}


def attach(model: nn.Module, kind: str, place: str, shape: tuple[int, ...]) -> Attachment:
    """Hang a fresh attachment onto `model`, in place; the outputs stay as they are until it is changed.

    Args:
        model: `cupel.images.models.Classifier`.
        kind: `polarizer`, `clamp` or `scale`.
        place: name of a submodule, e.g. `extractor.layer4.1.conv1`.
        shape: of the attachment, see its class.

    Returns:
        The attachment, on the device of the model's head.

    Raises:
        ValueError: unknown kind, or no module of that name.
    """
    one_of("attachment", kind, KINDS)
    hosts = {name: module for name, module in model.named_modules() if name}
    one_of("module to attach to", place, hosts)
    attachment = KINDS[kind](place, shape).to(model.head.weight.device)
    model.attachments.append(attachment)
    if attachment.before:
        hosts[place].register_forward_pre_hook(attachment.on_input)
    else:
        hosts[place].register_forward_hook(attachment.on_output)
    return attachment
