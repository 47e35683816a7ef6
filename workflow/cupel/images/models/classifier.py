"""The wrapper all classifiers share: pixels -> normalise -> extractor -> head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.registry import Registry

#: the decorator of a builder; `cupel.images.models.MODELS` is the same registry, filled
model = Registry("model", "cupel.images.models")


@dataclass(frozen=True)
class Parts:
    """What a builder of an architecture returns.

    Attributes:
        extractor: Network from normalised images [B, C, H, W] to penultimate features [B, d].
        head: Last linear layer, d -> K.
        stages: Names, inside ``extractor``, of the modules whose outputs are feature maps [B, c, h, w].
        hidden_linears: Names, inside ``extractor``, of the other linear layers of the classifier part.
        resize: Side to which images are brought inside the model; ``None`` takes them as they come.
    """

    extractor: nn.Module
    head: nn.Linear
    stages: tuple[str, ...]
    hidden_linears: tuple[str, ...] = ()
    resize: int | None = None


class Normalize(nn.Module):
    """Per-channel ``(x - mean) / std`` of pixels in [0, 1], so that attacks and defences can work in pixel space.

    Input and output are float [B, C, H, W]; ``mean`` and ``std`` are persistent float32 buffers [C, 1, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"pixels must be float in [0, 1], not {x.dtype}: divide uint8 images by 255")
        # Without this check a grey image would be broadcast to three channels in silence.
        if x.shape[-3] != self.mean.shape[0]:
            raise ValueError(f"expected {self.mean.shape[0]} image channels, got an input of shape {tuple(x.shape)}")
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """An image classifier h(x) = head(extractor(normalize(x))) on float pixels [B, C, H, W] in [0, 1].

    Attributes:
        extractor, head, resize: See :class:`Parts`; the head is what FST re-initialises.
        hidden_linears: Names as in :class:`Parts`, relative to this module: two in VGG, one in MobileNetV3-Large, else none;
            the IMS authors' port of FST treats them like the head.
        stages: Names as in :class:`Parts`, relative to this module, for attention-based defences such as NAD: the last three
            stages of the (pre-activation) ResNets, else the last feature map. At 32 pixels that map is 1x1 for the
            torchvision networks of total stride 32 (VGG, EfficientNet, MobileNet).
        spec: The JSON-able arguments of :func:`cupel.images.models.build` that make this architecture again.
        attachments: Modules that a defence has hung onto the network, see :mod:`cupel.images.models.attachments`; else empty.
    """

    def __init__(self, parts: Parts, normalize: Normalize, num_classes: int, spec: dict[str, Any]) -> None:
        super().__init__()
        if parts.head.out_features != num_classes:
            raise ValueError(f"model {spec['name']!r} has {parts.head.out_features} outputs, not {num_classes}")
        self.normalize = normalize
        self.extractor = parts.extractor
        self.head = parts.head
        self.attachments = nn.ModuleList()
        self.stages = tuple(f"extractor.{name}" for name in parts.stages)
        self.hidden_linears = tuple(f"extractor.{name}" for name in parts.hidden_linears)
        self.resize = parts.resize
        self.spec = spec

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features, float [B, d], of pixels [B, C, H, W] in [0, 1]."""
        if self.resize is not None and x.shape[-2:] != (self.resize, self.resize):
            # torchvision's Resize on tensors, in front of the network as in BackdoorBench and IMS.
            x = F.interpolate(x, size=(self.resize, self.resize), mode="bilinear", antialias=True)
        return self.extractor(self.normalize(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float [B, K], of pixels [B, C, H, W] in [0, 1]."""
        return self.head(self.features(x))
