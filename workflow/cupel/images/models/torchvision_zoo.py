"""torchvision's networks, split into extractor and head.

torchvision is imported when a network is built, not before: the import takes seconds, and on a CPU build of torch it
first needs :func:`cupel.compat.ensure_torchvision`.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from cupel.compat import ensure_torchvision
from cupel.images.models.classifier import Parts, model
from cupel.images.models.pretrained import load_imagenet

IMAGENET_FORM_FROM = 128
"""Image side from which ``resnet50`` and ``densenet161`` take their ImageNet form."""

_HEADS = {
    "densenet161": "classifier",
    "efficientnet_b3": "classifier.1",
    "mobilenet_v3_large": "classifier.3",
    "resnet50": "fc",
    "swin_t": "head",
    "vgg19_bn": "classifier.6",
    "vit_b_16": "heads.head",
}


def refuse_pretrained_cifar_form(name: str, pretrained: bool) -> None:
    if pretrained:
        raise ValueError(f"pretrained {name!r} exists in the ImageNet form only: give image_size >= {IMAGENET_FORM_FROM}")


def _network(name: str, num_classes: int, in_channels: int, pretrained: bool) -> tuple[nn.Module, nn.Linear]:
    """torchvision's network and its last linear layer, from scratch or with ImageNet weights and a fresh head."""
    if pretrained and in_channels != 3:
        raise ValueError(f"pretrained {name!r} takes 3 image channels, not {in_channels}")
    ensure_torchvision()
    from torchvision.models import get_model

    net = get_model(name, num_classes=num_classes)
    if in_channels != 3:
        _replace_first_conv(net, in_channels)
    head = net.get_submodule(_HEADS[name])
    if pretrained:
        load_imagenet(net, name, head=_HEADS[name])
        head = nn.Linear(head.in_features, num_classes)
    return net, head


def _replace_first_conv(net: nn.Module, in_channels: int) -> None:
    name, conv = next((name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    net.set_submodule(name, nn.Conv2d(in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                                      bias=conv.bias is not None))


def _without_head(net: nn.Module, **more: nn.Module) -> nn.Sequential:
    """Networks that are a chain of modules: all but the last one, and `more` behind."""
    *chain, _ = net.named_children()
    return nn.Sequential(OrderedDict([*chain, *more.items()]))


def _without_last_layer(net: nn.Module) -> nn.Sequential:
    """Networks of the form features, pooling, classifier: all but the last layer of the classifier."""
    return _without_head(net, flatten=nn.Flatten(), classifier=net.classifier[:-1])


def resnet50(*, num_classes: int, in_channels: int, pretrained: bool) -> Parts:
    """ResNet-50 for ImageNet sizes: 7x7 stem of stride 2, max-pooling."""
    net, head = _network("resnet50", num_classes, in_channels, pretrained)
    return Parts(_without_head(net, flatten=nn.Flatten()), head, stages=("layer2", "layer3", "layer4"))


@model("densenet161")
def densenet161(*, num_classes: int, in_channels: int, image_size: int, pretrained: bool) -> Parts:
    """DenseNet-161 (Huang et al., 2017); below 128 pixels with a 3x3 stem of stride 1 and no max-pooling."""
    cifar_form = image_size < IMAGENET_FORM_FROM
    if cifar_form:
        refuse_pretrained_cifar_form("densenet161", pretrained)
    net, head = _network("densenet161", num_classes, in_channels, pretrained)
    if cifar_form:
        net.features.conv0 = nn.Conv2d(in_channels, net.features.conv0.out_channels, 3, padding=1, bias=False)
        del net.features.pool0
    extractor = _without_head(net, relu=nn.ReLU(), avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return Parts(extractor, head, stages=("relu",))


@model("vgg19_bn")
def vgg19_bn(*, num_classes: int, in_channels: int, image_size: int, pretrained: bool) -> Parts:
    """VGG-19 with BatchNorm (Simonyan & Zisserman, 2015); the classifier part has three linear layers."""
    if image_size < 32:
        raise ValueError(f"vgg19_bn halves the image five times: image_size must be at least 32, not {image_size}")
    net, head = _network("vgg19_bn", num_classes, in_channels, pretrained)
    return Parts(_without_last_layer(net), head, stages=("features",), hidden_linears=("classifier.0", "classifier.3"))


@model("efficientnet_b3")
def efficientnet_b3(*, num_classes: int, in_channels: int, image_size: int, pretrained: bool) -> Parts:
    """EfficientNet-B3 (Tan & Le, 2019); the features end with its dropout."""
    net, head = _network("efficientnet_b3", num_classes, in_channels, pretrained)
    return Parts(_without_last_layer(net), head, stages=("features",))


@model("mobilenet_v3_large")
def mobilenet_v3_large(*, num_classes: int, in_channels: int, image_size: int, pretrained: bool) -> Parts:
    """MobileNetV3-Large (Howard et al., 2019); the classifier part has two linear layers."""
    net, head = _network("mobilenet_v3_large", num_classes, in_channels, pretrained)
    return Parts(_without_last_layer(net), head, stages=("features",), hidden_linears=("classifier.0",))


@model("swin_t")
def swin_t(*, num_classes: int, in_channels: int, image_size: int, pretrained: bool) -> Parts:
    """Swin-T (Liu et al., 2021) at 224 pixels; its feature map is taken where it is channels-first."""
    net, head = _network("swin_t", num_classes, in_channels, pretrained)
    return Parts(_without_head(net), head, stages=("permute",), resize=224)


class TokenMap(nn.Module):
    """Patch tokens [B, 1 + h*w, c] (class token first) as a feature map [B, c, h, w]."""

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:].transpose(1, 2)
        return patches.unflatten(2, (int(patches.shape[2] ** 0.5), -1))


class VisionTransformer(nn.Module):
    """torchvision's vision transformer without its head: [B, C, 224, 224] -> class token [B, c]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.conv_proj = net.conv_proj
        self.class_token = net.class_token
        self.encoder = net.encoder
        self.token_map = TokenMap()

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1))
        # A view that costs nothing, and that is the place where a hook finds the feature map.
        self.token_map(tokens)
        return tokens[:, 0]


@model("vit_b_16")
def vit_b_16(*, num_classes: int, in_channels: int, image_size: int, pretrained: bool) -> Parts:
    """ViT-B/16 (Dosovitskiy et al., 2021) at 224 pixels; its blocks are ``extractor.encoder.layers``."""
    net, head = _network("vit_b_16", num_classes, in_channels, pretrained)
    return Parts(VisionTransformer(net), head, stages=("token_map",), resize=224)
