"""Pre-activation ResNet-18 (He et al., 2016b) in BackdoorBench's form: no BatchNorm or ReLU before the pooling."""

import torch.nn.functional as F
from torch import Tensor, nn

from cupel.images.models.classifier import Parts, model
from cupel.images.models.resnet import cifar_resnet


class PreActBlock(nn.Module):
    """Twice BatchNorm, ReLU, 3x3 convolution: [B, inputs, H, W] -> [B, channels, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same_shape = stride == 1 and inputs == channels
        self.shortcut = None if same_shape else nn.Conv2d(inputs, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        # The projection reads the activated input, the identity the raw one.
        residual = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + residual


@model("preactresnet18")
def preactresnet18(*, num_classes: int, in_channels: int, image_size: int, width: int, stem_stride: int) -> Parts:
    """PreActResNet-18: blocks 2-2-2-2, channels w, 2w, 4w, 8w; 11.2 M parameters at w = 64. The main net of IMS."""
    return cifar_resnet(PreActBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, width=width,
                        stem_stride=stem_stride, stem_active=False)
