"""Networks on disk: one safetensors file that holds the weights and the arguments that build the network.

The file format is one for all families. What a `spec` builds is the family's: it hands `load` a function for it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cupel.files import atomic
from cupel.training.engine import require_finite

FORMAT = "cupel.classifier/1"


class NotACheckpoint(ValueError):
    """The file is not one that :func:`save` wrote, or it does not fit the network that it names."""


class DamagedCheckpoint(NotACheckpoint, OSError):
    """The file cannot be read: no method's fault."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``path`` as safetensors, with its ``spec`` and its attachments as metadata.

    The file appears whole or not at all, and missing folders are made. Equal models give equal bytes: weights in
    channels-last order are stored in the usual order.

    Raises:
        Diverged: a weight is not finite (infinity is allowed in what is attached: it bounds nothing).
        ValueError: the network does not say how it is built.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper would prefix every key
    if not getattr(model, "spec", None):
        raise ValueError("this network has no spec to build it again by: make it with build() or blank()")
    tensors = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    require_finite((value[~value.isinf()] if key.startswith("attachments.") else value
                    for key, value in tensors.items()), "weights")
    # One key only: safetensors writes several in random order, and equal models shall be equal files.
    recipe = {"format": FORMAT, "spec": model.spec}
    if getattr(model, "attachments", None):
        recipe["attachments"] = [attachment.describe() for attachment in model.attachments]
    recipe = json.dumps(recipe, sort_keys=True)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"cupel": recipe})


def load(path: str | os.PathLike[str], rebuild: Callable[[dict, list[dict]], nn.Module]) -> nn.Module:
    """Rebuild the network that :func:`save` wrote: same weights bit for bit, on the CPU, in training mode.

    ``rebuild`` makes the network of a ``spec`` and its attachments; called under the meta device, its weights are not used.

    Raises:
        FileNotFoundError: There is no such file.
        NotACheckpoint: It is not safetensors, not by :func:`save`, or its tensors are not those of the network.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; train the model first (cupel.checkpoint.save writes this file)")
    spec, attachments, tensors = _read(path)
    try:
        # Weights come from the file, so nothing is initialised, downloaded or drawn from a generator.
        with torch.device("meta"):
            model = rebuild(spec, attachments)
    except (TypeError, ValueError) as error:
        raise NotACheckpoint(f"{path}: its recipe {spec} builds no model of this version of cupel: {error}") from error
    wanted = {key: value.dtype for key, value in model.state_dict().items()}
    if other := [key for key, value in tensors.items() if value.dtype != wanted.get(key, value.dtype)]:
        raise NotACheckpoint(f"{path}: {other[0]} is {tensors[other[0]].dtype}, but the model {spec['name']!r} computes in "
                             f"{wanted[other[0]]}: convert the network before it is saved")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise NotACheckpoint(f"{path} does not fit the model {spec['name']!r} it names: {reason}") from None
    model.spec = spec
    return model


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, torch.Tensor]]:
    right = "expected a .safetensors file written by cupel.checkpoint.save"
    if not path.is_file():
        raise NotACheckpoint(f"{path} is a folder; {right}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # The tensors are views of the mapped file: were it truncated later, reading them would kill the process.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        with path.open("rb") as file:
            pickled = file.read(1) in (b"P", b"\x80")  # a zip archive (torch.save) or a bare pickle
        what = "a pickled file, which could run code when opened" if pickled else f"damaged or another format ({error})"
        raise (NotACheckpoint if pickled else DamagedCheckpoint)(f"{path} is {what}; {right}") from None
    try:
        recipe = json.loads(metadata.get("cupel", "{}"))
        found, spec = recipe.get("format"), recipe.get("spec")
    except (json.JSONDecodeError, AttributeError, RecursionError):
        found = spec = None
    if found != FORMAT:
        raise NotACheckpoint(f"{path} is safetensors of format {found!r}, not {FORMAT!r}; {right}")
    if not isinstance(spec, dict) or "name" not in spec:
        raise NotACheckpoint(f"{path} does not say which model it holds; {right}")
    return spec, recipe.get("attachments", []), tensors
