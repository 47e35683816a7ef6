"""Image classifiers: one builder per architecture, one wrapper that takes pixels.

``build`` makes a :class:`Classifier` by name; ``save`` and ``load`` keep it in one safetensors file that carries all
that is needed to build it again. An architecture of your own is one function, here or in a plugin:

    @model("mine")
    def mine(*, num_classes, in_channels, image_size) -> Parts: ...

Of ``width``, ``stem_stride`` and ``pretrained`` a builder declares those it can honour; asking for another is an error.
"""

import contextlib
import inspect
import os
from collections.abc import Sequence

from cupel import checkpoint
from cupel.checkpoint import NotACheckpoint, save
from cupel.images.models.attachments import attach
from cupel.images.models.classifier import Classifier, Normalize, Parts, model
from cupel.images.models.pretrained import WeightsUnavailable
from cupel.registry import one_of
from cupel.rng import seeded

__all__ = ["MODELS", "Classifier", "Normalize", "NotACheckpoint", "Parts", "WeightsUnavailable", "build", "load", "model",
           "save"]

#: builders by name
MODELS = model.fill()

_DEFAULTS = {"width": 64, "stem_stride": 1, "pretrained": False}


def build(name: str, *, num_classes: int, image_size: int = 32, mean: Sequence[float] = (0.0, 0.0, 0.0),
          std: Sequence[float] = (1.0, 1.0, 1.0), width: int = 64, stem_stride: int = 1, pretrained: bool = False,
          seed: int | None = None, in_channels: int = 3) -> Classifier:
    """Build a classifier of pixels in [0, 1].

    Args:
        name: A key of :data:`MODELS`.
        num_classes: K, the number of outputs.
        image_size: Side of the images in pixels. It chooses between the CIFAR form (below 128) and the ImageNet form
            of ``resnet50`` and ``densenet161``; the other networks take any size, as they are.
        mean, std: Per-channel normalisation applied inside the model. A constant vector of any length fits any number
            of channels.
        width: Channels of the first stage (``resnet18``, ``preactresnet18``).
        stem_stride: Stride of the 3x3 stem of the same two; 2 quarters the cost.
        pretrained: Start from torchvision's ``IMAGENET1K_V1`` weights with a fresh head.
        seed: Draw the initial weights (on the CPU) from this seed and leave the global generators as they were.
            ``None`` draws from the global generator, on the current default device.
        in_channels: C, the number of image channels.

    Returns:
        A float32 :class:`Classifier` in training mode.

    Raises:
        ValueError: An unknown name, or an argument that this architecture cannot take; the text says which can.
        WeightsUnavailable: ``pretrained`` weights are neither in torch's hub cache nor downloadable.
    """
    one_of("model", name, MODELS)
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    options = {"width": width, "stem_stride": stem_stride, "pretrained": pretrained}
    for key, value in {**sizes, "width": width, "stem_stride": stem_stride}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a positive integer, not {value!r}")
    mean, std = _per_channel("mean", mean, in_channels), _per_channel("std", std, in_channels)
    if min(std) <= 0:
        raise ValueError(f"std must be positive, not {std}")
    arguments = sizes | {key: value for key, value in options.items() if _takes(name, key)}
    for key in options.keys() - arguments.keys():
        if options[key] != _DEFAULTS[key]:
            able = ", ".join(other for other in sorted(MODELS) if _takes(other, key))
            raise ValueError(f"model {name!r} cannot take {key}={options[key]!r}; these can: {able}")

    spec = {"name": name, **sizes, "mean": mean, "std": std, **options, "seed": seed}
    with contextlib.nullcontext() if seed is None else seeded(seed):
        return Classifier(MODELS[name](**arguments), Normalize(mean, std), num_classes, spec)


def load(path: str | os.PathLike[str]) -> Classifier:
    """The classifier that :func:`save` wrote, with its attachments; see :func:`cupel.checkpoint.load`."""
    return checkpoint.load(path, _rebuild)


def _rebuild(spec: dict, attachments: list[dict]) -> Classifier:
    model = build(**{**spec, "pretrained": False, "seed": None})
    for attachment in attachments:
        attach(model, **attachment)
    return model


def _takes(name: str, option: str) -> bool:
    return option in inspect.signature(MODELS[name]).parameters


def _per_channel(what: str, values: Sequence[float], channels: int) -> list[float]:
    values = [float(value) for value in values]
    if values and len(set(values)) == 1:
        return values[:1] * channels
    if len(values) != channels:
        raise ValueError(f"{what} has {len(values)} entries for images of {channels} channels")
    return values
