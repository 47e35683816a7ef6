"""The paper's networks: Small, Pool and WResNet (proper_interpretability SPEC 5).

    f_c(x) = 1/(hw) Σ_ij Σ_d W_dc A_dij(x)

A is the output of the last convolution (or pooling, or residual sum), with no ReLU behind it; W has no bias. Both
matter: else the mean of a class activation map would not be the logit. Convolutions pad like TensorFlow's "SAME".

Nothing but f and its maps Σ_d W_dc A_dij is asked for in training, and both are linear in what the last convolution sees. So f
takes the mean before it, and the maps the sum over d: of Small's 8 million multiplications an image there remain 0.7 and 1.2.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel import checkpoint
from cupel.registry import one_of

Activation = Callable[[Tensor], Tensor]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Rows (or columns) that "SAME" adds before and after `size`, so that ⌈size / stride⌉ come out.

    An odd one goes behind: a 3x3 convolution of stride 2 on an even size pads (0, 1), where torch's `padding=1` would
    look at other pixels.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """x [B, C, H, W] padded with `value` for a window of side `kernel`."""
    (top, bottom), (left, right) = (same_padding(size, kernel, stride) for size in x.shape[-2:])
    return F.pad(x, (left, right, top, bottom), value=value) if top or bottom or left or right else x


@functools.cache
@torch.inference_mode(False)  # kept for gradients too, whoever asks first
def taps(shape: torch.Size, kernel: int, stride: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """At how many places of a "SAME" window each of its taps sees each pixel of a picture (H, W): [H · W, kernel²]."""
    def line(size: int) -> Tensor:
        seen = torch.arange(-(-size // stride)) * stride + torch.arange(kernel)[:, None] - same_padding(size, kernel, stride)[0]
        return F.one_hot(seen.clamp(-1, size) + 1, size + 2)[:, :, 1:-1].sum(1)

    return torch.kron(*map(line, shape)).T.contiguous().to(device, dtype)


class SameConv2d(nn.Conv2d):
    """Square convolution with bias and "SAME" padding."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [B, C, H, W] convolved with another kernel in this layer's way."""
        pads = [same_padding(size, self.kernel_size[0], self.stride[0]) for size in x.shape[2:]]
        if all(before == after for before, after in pads):  # what torch pads itself costs no copy
            return F.conv2d(x, weight, bias, self.stride, tuple(before for before, _ in pads))
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, bias, self.stride)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the output over space, float [B, d], of which no more is computed."""
        seen = x.flatten(2) @ taps(x.shape[2:], self.kernel_size[0], self.stride[0], dtype=x.dtype, device=x.device)
        places = math.prod(-(-size // self.stride[0]) for size in x.shape[2:])  # divided by here: counts are exact in bf16
        return F.linear(seen.flatten(1) / places, self.weight.flatten(1), self.bias)

    def mixed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sums of the output's channels, weight [K, d] times output, float [B, K, h, w], of which no more is computed."""
        return self.convolve(x, torch.einsum("kd,dcij->kcij", weight, self.weight), weight @ self.bias)


class Chain(nn.Module):
    """Convolutions (channels, kernel, stride) in a row; where `pooled` with a 2x2 maximum behind each (Small, Pool)."""

    def __init__(self, in_channels: int, layers: Sequence[tuple[int, int, int]], pooled: bool = False):
        super().__init__()
        widths = [in_channels, *(width for width, _, _ in layers)]
        self.convs = nn.ModuleList(SameConv2d(c, width, kernel, stride)
                                   for c, (width, kernel, stride) in zip(widths, layers, strict=False))
        self.pooled, self.channels = pooled, widths[-1]

    @property
    def last(self) -> SameConv2d | None:
        """The convolution that makes A; None where something else does."""
        return None if self.pooled else self.convs[-1]

    def forward(self, x: Tensor, activation: Activation = F.relu) -> Tensor:
        for number, conv in enumerate(self.convs):
            x = activation(x) if number else x
            if conv is not self.last:
                x = conv(x)
            if self.pooled:
                x = F.max_pool2d(pad_same(x, 2, 2, -torch.inf), 2)
        return x


class Block(nn.Module):
    """v + shortcut(h) with u = conv_a(σ(h)), v = conv_b(σ(u)); the shortcut has no parameters and no activation."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv_a = SameConv2d(inputs, outputs, 3, stride)
        self.conv_b = SameConv2d(outputs, outputs, 3)
        self.stride, self.added = stride, (outputs - inputs) // 2

    def forward(self, h: Tensor, activation: Activation = F.relu) -> Tensor:
        v = self.conv_b(activation(self.conv_a(activation(h))))
        if self.stride > 1:
            h = F.avg_pool2d(h, self.stride)
        return v + F.pad(h, (0, 0, 0, 0, self.added, self.added))


class Residual(nn.Module):
    """A 3x3 convolution and stages of `depth` pre-activation blocks; every stage but the first begins with stride 2 (WResNet).

    `widths` are the channels of the stages; the first is that of the convolution in front too.
    """

    def __init__(self, in_channels: int, widths: Sequence[int] = (16, 32, 64), depth: int = 5):
        super().__init__()
        self.conv = SameConv2d(in_channels, widths[0], 3)
        before = [widths[0], *widths]
        self.blocks = nn.ModuleList(
            Block(before[stage] if first else width, width, 2 if first and stage else 1)
            for stage, width in enumerate(widths) for first in [True] + [False] * (depth - 1))
        self.channels, self.last = widths[-1], None

    def forward(self, x: Tensor, activation: Activation = F.relu) -> Tensor:
        x = self.conv(x)
        for block in self.blocks:
            x = block(x, activation)
        return x


class GapClassifier(nn.Module):
    """Logits f(x) = head(mean over space of A(x)) of float pixels [B, C, H, W] in [0, 1]; nothing is normalised."""

    def __init__(self, extractor: Chain | Residual, num_classes: int):
        super().__init__()
        self.extractor = extractor  # pixels to hidden
        self.head = nn.Linear(extractor.channels, num_classes, bias=False)  # W
        self.spec: dict = {}  # JSON-able arguments by which :func:`load` builds it again; empty if not made by :func:`blank`

    def hidden(self, x: Tensor, activation: Activation = F.relu) -> Tensor:
        """What the last convolution sees; A(x) itself where A is the output of something else. `activation` replaces every ReLU
        (integrated gradients use softplus).

        Raises:
            TypeError: integer pixels.
        """
        if not x.is_floating_point():
            raise TypeError(f"pixels must be float in [0, 1], not {x.dtype}: divide uint8 images by 255")
        return self.extractor(x, activation)

    def feature_map(self, hidden: Tensor) -> Tensor:
        """A, float [B, d, h, w], linear: it has negative entries."""
        last = self.extractor.last
        return last(hidden) if last else hidden

    def class_maps(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """Σ_d W_dc A_dij of all classes, float [B, K, h, w]; `weight`, float [K, d], stands in for W."""
        last, weight = self.extractor.last, self.head.weight if weight is None else weight
        return last.mixed(hidden, weight) if last else torch.einsum("kd,bdij->bkij", weight, hidden)

    def features(self, hidden: Tensor) -> Tensor:
        """Penultimate features, the mean of A over space, float [B, d]."""
        last = self.extractor.last
        return last.mean(hidden) if last else hidden.mean((2, 3))

    def forward(self, x: Tensor, activation: Activation = F.relu) -> Tensor:
        """Logits, float [B, K]."""
        return self.head(self.features(self.hidden(x, activation)))


def initialise(model: GapClassifier, seed: int = 99) -> GapClassifier:
    """Draw the initial weights in place: N(0, 1 / fan_in), biases 0 (proper_interpretability SPEC 5).

    They come from NumPy's legacy generator, layer by layer, output channel outermost, then rows, columns and input
    channels: seed 99 gives the very numbers that the authors' training starts from.
    """
    draw = np.random.RandomState(seed)
    layers = [layer for layer in model.modules() if isinstance(layer, (SameConv2d, nn.Linear))]
    with torch.no_grad():
        for layer in sorted(layers, key=lambda layer: layer is model.head):
            outputs, inputs, *kernel = layer.weight.shape
            side = kernel[0] if kernel else 1
            value = draw.normal(scale=(side * side * inputs) ** -0.5, size=(outputs, side, side, inputs))
            layer.weight.copy_(torch.from_numpy(value).permute(0, 3, 1, 2).reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.zero_()
    return model


NETWORKS = {
    # map of a quarter of the side, 100 channels (MNIST, CIFAR-10)
    "small": lambda in_channels: Chain(in_channels, [(16, 4, 2), (32, 4, 2), (100, 7, 1)]),
    # each convolution is followed by a maximum (MNIST)
    "pool": lambda in_channels: Chain(in_channels, [(32, 5, 1), (64, 5, 1)], pooled=True),
    # 31 convolutions of 16, 32 and 64 channels; in spite of its name it is not widened (CIFAR-10, R-ImageNet)
    "wresnet": Residual,
}


def blank(name: str, num_classes: int, in_channels: int) -> GapClassifier:
    """A network whose weights are yet to be set; the global generators are left as they were.

    Raises:
        ValueError: an unknown name.
    """
    one_of("network", name, NETWORKS)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = GapClassifier(NETWORKS[name](in_channels), num_classes)
    model.spec = {"family": "gap", "name": name, "num_classes": num_classes, "in_channels": in_channels}
    return model


def build(name: str, *, num_classes: int = 10, in_channels: int = 3, seed: int = 99) -> GapClassifier:
    """A freshly initialised float32 network, see :func:`blank` and :func:`initialise`."""
    return initialise(blank(name, num_classes, in_channels), seed)


def load(path: str | Path) -> GapClassifier:
    """The network that :func:`cupel.checkpoint.save` wrote; see :func:`cupel.checkpoint.load`."""
    return checkpoint.load(path, lambda spec, attachments: blank(**{k: v for k, v in spec.items() if k != "family"}))
