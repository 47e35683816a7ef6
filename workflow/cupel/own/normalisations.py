"""What is done to pixels before a network: by name or by numbers. Nothing heavy is imported, so that a grid can check it."""

import math
from collections.abc import Sequence

from cupel.registry import unknown

#: usual normalisations by name, (mean, std): one number, or one a channel
NORMALISATIONS = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "bytes": ((0.0,), (1 / 255,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar10-0.2": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "mnist": ((0.1307,), (0.3081,)),
}


def normalisation(text: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation from a name of `NORMALISATIONS`, or from numbers: `0.5/0.5`, `0.49,0.48,0.45/0.2,0.2,0.2`.

    Raises:
        ValueError: it is neither.
    """
    if text in NORMALISATIONS:
        return NORMALISATIONS[text]
    try:
        mean, std = ([float(value) for value in part.split(",")] for part in text.split("/"))
    except ValueError:
        raise ValueError(f"{unknown('normalisation', text, NORMALISATIONS)}; or numbers, mean/std") from None
    if not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        raise ValueError(f"normalisation {text}: what stands behind / are standard deviations, and they are positive; all are "
                         "finite numbers")
    return mean, std
