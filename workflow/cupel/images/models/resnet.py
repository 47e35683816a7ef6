"""ResNet (He et al., 2016) in the CIFAR form used by BackdoorBench: 3x3 stem, no max-pooling, four stages."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from cupel.images.models import torchvision_zoo
from cupel.images.models.classifier import Parts, model


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The shortcut: the identity where the shape stays, else a strided 1x1 convolution with BatchNorm."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: [B, inputs, H, W] -> [B, channels, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _projection(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, strided 3x3, 1x1 convolutions: [B, inputs, H, W] -> [B, 4 * channels, H/stride, W/stride]."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def residual_stages(block: type, depths: tuple[int, ...], width: int) -> OrderedDict[str, nn.Sequential]:
    """Stages ``layer1`` ... of ``depths[i]`` blocks with ``width * 2**i`` channels; all but the first halve the map.

    ``block(inputs, channels, stride)`` gives ``block.expansion * channels`` channels.

    Raises:
        ValueError: fewer than 8 channels. The gradient of a 1x1 convolution of stride 2, channels last, writes past its
            memory then on CPUs with AVX2 alone (torch 2.13).
    """
    if width < 8:
        raise ValueError(f"a residual network of width {width}: at least 8 channels are needed")
    stages, inputs = OrderedDict(), width
    for index, depth in enumerate(depths):
        channels = width * 2**index
        blocks = []
        for position in range(depth):
            blocks.append(block(inputs, channels, stride=2 if index > 0 and position == 0 else 1))
            inputs = block.expansion * channels
        stages[f"layer{index + 1}"] = nn.Sequential(*blocks)
    return stages


def cifar_resnet(block: type[nn.Module], depths: tuple[int, ...], *, num_classes: int, in_channels: int, width: int = 64,
                 stem_stride: int = 1, stem_active: bool = True) -> Parts:
    """A network of residual blocks; with `stem_active`, BatchNorm and ReLU follow its first convolution."""
    active = [("bn1", nn.BatchNorm2d(width)), ("relu", nn.ReLU())] if stem_active else []
    extractor = nn.Sequential(OrderedDict([
        ("conv1", nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)), *active,
        *residual_stages(block, depths, width).items(), ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]))
    head = nn.Linear(block.expansion * width * 8, num_classes)
    return Parts(extractor, head, stages=("layer2", "layer3", "layer4"))


@model("resnet18")
def resnet18(*, num_classes: int, in_channels: int, image_size: int, width: int, stem_stride: int) -> Parts:
    """ResNet-18: blocks 2-2-2-2, channels w, 2w, 4w, 8w; 11.2 M parameters at w = 64. The CIFAR-10 net of FST."""
    return cifar_resnet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, width=width,
                        stem_stride=stem_stride)


@model("resnet50")
def resnet50(*, num_classes: int, in_channels: int, image_size: int, pretrained: bool) -> Parts:
    """ResNet-50: blocks 3-4-6-3; CIFAR form below 128 pixels, torchvision's from there on."""
    if image_size >= torchvision_zoo.IMAGENET_FORM_FROM:
        return torchvision_zoo.resnet50(num_classes=num_classes, in_channels=in_channels, pretrained=pretrained)
    torchvision_zoo.refuse_pretrained_cifar_form("resnet50", pretrained)
    return cifar_resnet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels)
