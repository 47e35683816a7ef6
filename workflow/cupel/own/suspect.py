"""What the user names, on the command line or in a YAML: a checkpoint and its architecture, clean data, a trigger."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from cupel.images import attacks, models
from cupel.own import data, imports
from cupel.own.normalisations import normalisation


def opened_network(checkpoint: str, arch: str | None, size: int | None) -> tuple[nn.Module, Callable]:
    """The network with its weights, and what writes a network as the file was written (see `cupel.own.run.purify`).

    Args:
        checkpoint: weights as `imports.Weights` reads them, or a TorchScript or `torch.export` file.
        arch: as for `imports.architecture`; none where the checkpoint is a network, or one that the library wrote.
        size: of the images, for architectures that ask for it; None: 32.

    Raises:
        ValueError: they cannot be read, or do not fit.
    """
    if (network := imports.compiled(checkpoint)) is not None:
        return network, imports.write_plain
    weights = imports.Weights(checkpoint)
    if arch:
        network = imports.architecture(arch, weights.classes(), size or 32, weights.channels())
    elif "cupel" in (weights.metadata or {}):
        network = models.load(checkpoint)
    else:
        raise ValueError(f"{checkpoint} holds weights and no network: say which (--arch file.py:function, or a name)")
    weights.put(network)

    def write(purified: nn.Module, path: Path) -> Path:
        path = path.with_name(path.name + Path(checkpoint).suffix)
        weights.write(purified, path)
        return path

    return network, write


def opened(given: Mapping) -> tuple[tuple, dict, Callable]:
    """Open what the user names, and say what the clean images are.

    Args:
        given: `checkpoint`, `arch`, `normalize`, `head`, `clean`, `measure`, `tuning`, `size`, `crop`, `flip`, `trigger`,
            `target`, as options of `cupel purify` say (docs/your-model.md); all but `checkpoint` and `clean` may be missing.

    Returns:
        Network, images and labels; other arguments of `cupel.own.run.Study`; and what writes a network as the file was written.

    Raises:
        ValueError: something cannot be read, or does not fit.
    """
    mean, std = normalisation(given.get("normalize") or "none")
    size, trigger = given.get("size"), given.get("trigger")
    network, write = opened_network(given["checkpoint"], given.get("arch"), size)
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    channels = first.in_channels if first is not None and first.in_channels in (1, 3) else 3
    clean = data.read(given["clean"], channels, size)
    study = {key: given[key] for key in ("head", "tuning", "crop", "flip", "target") if given.get(key) is not None}
    if given.get("measure"):
        other = data.read(given["measure"], channels, size)
        study["measured_on"] = other.images, other.labels
    if trigger:
        study["trigger"] = imports.from_file(trigger) if ".py:" in trigger else attacks.build(trigger)
    print(f"{len(clean)} clean images of {clean.image_size}×{clean.image_size} pixels and {channels} channels from "
          f"{clean.name}{f', brought to size {size}' if size else ''}; classes {', '.join(clean.classes[:10])}"
          f"{' ...' if len(clean.classes) > 10 else ''}", file=sys.stderr)
    return (network, clean.images, clean.labels), {**study, "mean": mean, "std": std}, write
