"""ImageNet weights of torchvision: fetched through torch's hub cache, verified, loaded without running their pickle."""

import pickle
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from cupel.sources import Raw, SourceError, Url, fetch_raw


class WeightsUnavailable(OSError):
    """Pretrained weights are neither in the cache nor downloadable."""


def load_imagenet(net: nn.Module, name: str, *, head: str) -> None:
    """Load torchvision's ``IMAGENET1K_V1`` weights of model ``name`` into ``net``, all but its layer ``head``."""
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).IMAGENET1K_V1
    path = weights_file(weights)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsUnavailable(f"{path} has the checksum of {weights!r} but cannot be read: {error}") from None
    dropped = {f"{head}.weight", f"{head}.bias"}
    state = {_current_key(key): value for key, value in state.items() if key not in dropped}
    report = net.load_state_dict(state, strict=False)
    if set(report.missing_keys) != dropped or report.unexpected_keys:
        raise WeightsUnavailable(f"{path} does not hold the weights of {name!r} as this torchvision builds it")


def _current_key(key: str) -> str:
    """The DenseNet file is older than torch's ban on dots in module names: ``denselayer1.norm.1`` is now ``norm1``."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


def weights_file(weights: Any) -> Path:
    """The verified local file of a torchvision weights entry, downloaded into torch's hub cache where it is missing.

    Raises:
        WeightsUnavailable: It is not there (or damaged) and the official origin cannot be reached.
    """
    name = Path(urlparse(weights.url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    # torchvision's file names end in the first digits of the file's SHA-256.
    prefix = re.search(r"-([0-9a-f]{8,})\.", name).group(1)
    there = path.is_file()
    try:
        return fetch_raw(Raw(name, f"sha256:{prefix}", Url(weights.url)), path.parent)
    except (SourceError, OSError) as error:
        found = f"the file there is damaged (its SHA-256 does not begin with {prefix})" if there else "no file is there"
        raise WeightsUnavailable(
            f"pretrained weights {name} are not available: {found}, and the download failed ({error}).\n"
            f"They are torchvision's {weights!r}. Download that file on a machine with network access and put it at\n"
            f"    {path}\n"
            "(that is $TORCH_HOME/hub/checkpoints/), or build the model with pretrained=False."
        ) from None
