"""Architectures by name or from the user's files, and checkpoints in whatever form their authors wrote them."""

import ast
import contextlib
import copy
import difflib
import functools
import importlib.util
import inspect
import operator
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cupel.cells import failure
from cupel.compat import ensure_torchvision
from cupel.files import atomic
from cupel.registry import module, unknown

#: keys under which checkpoints keep weights, the likelier first; then any other
USUAL = ("state_dict", "model_state_dict", "model", "net", "netC", "weights", "params", "model_state", "network")


def from_file(text: str) -> Any:
    """What `file.py:name` stands for; `file.py:name(16, width=2)` is called, with plain values.

    The file is executed, with its folder on Python's path.

    Raises:
        ValueError: there is no such file or name, the arguments are no plain values, or the file or the call ends in an error.
    """
    source, _, call = text.partition(".py:")
    path = Path(f"{source}.py")
    if not path.is_file():
        raise ValueError(f"there is no file {path} (asked for as {text!r})")
    try:
        node = ast.parse(call, mode="eval").body
        given = [ast.literal_eval(value) for value in getattr(node, "args", ())]
        named = {key.arg: ast.literal_eval(key.value) for key in getattr(node, "keywords", ())}
        name = (node.func if isinstance(node, ast.Call) else node).id
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(f"{text!r}: behind the file stands a name, or a call with plain values such as "
                         "net.py:WideResNet(16, width=1)") from None
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))
    with said(f"{path} cannot be executed"):
        theirs = module(path)
    if not hasattr(theirs, name):
        raise ValueError(unknown(f"name in {path}", name, (key for key in vars(theirs) if not key.startswith("_"))))
    found = getattr(theirs, name)
    if not isinstance(node, ast.Call):
        return found
    with said(f"{text} cannot be called"):
        return found(*given, **named)


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    """Around code of the user: what goes wrong in it is said in a sentence that names it.

    Raises:
        ValueError: in place of whatever it is, but for the machine's errors.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {failure(error)}") from None


def architecture(text: str, classes: int, image_size: int, channels: int = 3) -> nn.Module:
    """A network with any weights.

    Args:
        text: `file.py:name`, a function that builds it, a class, or a finished network; or a name: of torchvision, of timm
            where that is installed, or of a network that a plugin registers with `@model`.
        classes, image_size, channels: given to those builders that ask for them; torchvision's take three channels.

    Raises:
        ValueError: unknown, or what it names builds no network.
    """
    if ".py:" in text:
        found = from_file(text)
        if not isinstance(found, nn.Module):
            with said(f"{text} cannot be called"):
                asked = inspect.signature(found).parameters
                found = found(**{"num_classes": classes} if "num_classes" in asked else {})
        if not isinstance(found, nn.Module):
            raise ValueError(f"{text} gives {type(found).__name__}, not a network (torch.nn.Module)")
        return found
    from cupel.images.models import MODELS, build

    ensure_torchvision()
    from torchvision.models import get_model, list_models

    timm = importlib.import_module("timm") if importlib.util.find_spec("timm") else None
    plugin = text in MODELS and not MODELS[text].__module__.startswith("cupel.images.models.")
    if text in list_models() and not plugin:
        return get_model(text, num_classes=classes)
    if timm and text in timm.list_models() and not plugin:
        return timm.create_model(text, num_classes=classes, in_chans=channels)
    if text in MODELS:
        return build(text, num_classes=classes, image_size=image_size, in_channels=channels)
    near = difflib.get_close_matches(text, [*list_models(), *MODELS, *(timm.list_models() if timm else ())], 1)
    raise ValueError(f"unknown architecture {text!r}{f', did you mean {near[0]!r}?' if near else ''}: give a name of "
                     f"torchvision{' or timm' if timm else ' (timm is not installed)'}, of a plugin's @model, or "
                     "file.py:function")


def compiled(path: str | Path) -> nn.Module | None:
    """A network with its weights out of a TorchScript or `torch.export` file; None where the file is neither.

    Raises:
        ValueError: it looks like one, and cannot be loaded.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        names = {name.partition("/")[2] for name in file.namelist()}
    try:
        if any(name.startswith("code/") for name in names):
            return torch.jit.load(str(path), map_location="cpu")
        if names & {"archive_format", "serialized_exported_program.json"}:
            network = torch.export.load(str(path)).module()
            # an exported graph has no modes; defences ask for them
            network.train, network.eval = (lambda mode=True: network), (lambda: network)
            return network
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded: {str(error).strip().splitlines()[-1]}") from None
    return None


def _place(content: Any) -> tuple[str, ...] | None:
    """Keys on the way to a dict of tensors; None if there is none."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(value, Tensor) for value in content.values()):
        return ()
    others = [key for key in content if isinstance(key, str) and key not in USUAL and "optim" not in key]
    for key in [key for key in USUAL if key in content] + others:
        if (rest := _place(content[key])) is not None:
            return (key, *rest)
    return None


class Weights:
    """A checkpoint as its author wrote it: safetensors, or a file of `torch.save` that holds tensors and plain values.

    Attributes:
        path: of the file.
        tensors: by the file's names.
        names: name in the file to name in the network, once `put` was called.

    Raises:
        ValueError: the file is neither, or there are no weights in it.
    """

    def __init__(self, path: str | Path):
        self.path, self.content, self.place, self.metadata, self.names = Path(path), None, (), None, {}
        if not self.path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            with safe_open(self.path, "pt") as file:
                self.metadata = file.metadata()
                self.tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return
        except SafetensorError:
            pass
        try:
            self.content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            self._refuse(error)
        self.place = _place(self.content)
        if self.place is None:
            raise ValueError(f"{path} holds no weights: a dict of tensors is looked for, as it is or under {', '.join(USUAL)}")
        self.tensors = dict(functools.reduce(operator.getitem, self.place, self.content))

    def _refuse(self, error: Exception) -> None:
        with self.path.open("rb") as file:
            pickled = file.read(1) in (b"P", b"\x80")  # a zip archive (torch.save) or a bare pickle
        if pickled and "weights_only" in str(error):
            raise ValueError(f"{self.path} holds more than tensors and plain values, and opening it could run any code: it "
                             "is not opened. Where you trust it, load it with the code that wrote it, and save "
                             "network.state_dict()") from None
        raise ValueError(f"{self.path} is damaged, or neither safetensors nor a file of torch.save "
                         f"({type(error).__name__})") from None

    def classes(self) -> int:
        """Number of classes, by the last matrix or vector of the file."""
        sizes = [len(tensor) for name, tensor in self.tensors.items() if tensor.ndim in (1, 2) and "running_" not in name]
        return sizes[-1] if sizes else 0

    def channels(self) -> int:
        """Number of image channels, by the first kernel of the file; 3 where that says neither 1 nor 3."""
        first = next((tensor.shape[1] for tensor in self.tensors.values() if tensor.ndim == 4), 3)
        return first if first in (1, 3) else 3

    def put(self, network: nn.Module) -> None:
        """Load the weights into a network; `module.` and prefixes that all names share are no difference.

        Raises:
            ValueError: names or shapes differ; the text says which.
        """
        wanted = network.state_dict()
        names = {key: key if key in wanted else key.replace("_orig_mod.", "").replace("module.", "") for key in self.tensors}
        while (not wanted.keys() & {*names.values()} and len({name.partition(".")[0] for name in names.values()}) == 1
               and all("." in name for name in names.values())):
            names = {key: name.partition(".")[2] for key, name in names.items()}
        self.names, given = names, {name: self.tensors[key] for key, name in names.items()}
        missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
        surplus = [name for name in given if name not in wanted]
        shapes = [f"{name} is {_shape(given[name])} in the file and {_shape(wanted[name])} in the network"
                  for name in wanted if name in given and given[name].shape != wanted[name].shape]
        faults = [_some("missing in the file", missing), _some("not in the network", surplus), _some("", shapes)]
        if any(faults):
            raise ValueError(f"{self.path} does not fit the architecture: {'; '.join(filter(None, faults))}")
        network.load_state_dict(given, strict=False)

    def write(self, network: nn.Module, path: Path) -> None:
        """Write a network's weights as the file was written: its names, its types, and whatever else it holds.

        The network gets what was written, where that is rounded to half precision.
        """
        state = network.state_dict()
        tensors = {key: state[name].detach().cpu().to(self.tensors[key].dtype).contiguous().clone()
                   for key, name in self.names.items()}
        network.load_state_dict({self.names[key]: tensor for key, tensor in tensors.items()}, strict=False)
        with atomic(path) as temporary:
            if self.content is None:
                save_file(tensors, temporary, metadata=self.metadata)
                return
            content = holder = copy.copy(self.content)
            for key in self.place:
                holder[key] = holder = copy.copy(holder[key])
            holder.update(tensors)
            torch.save(content, temporary)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what} {', '.join(names[:4])}{more}".strip() if names else ""


def write_plain(network: nn.Module, path: Path) -> Path:
    """Write a network that came from no checkpoint: TorchScript as such, others by their `state_dict`, as safetensors."""
    if isinstance(network, torch.jit.ScriptModule):
        path = path.with_suffix(".pt")
        with atomic(path) as temporary, contextlib.suppress(AttributeError):
            torch.jit.save(network, str(temporary))
        return path
    path = path.with_suffix(".safetensors")
    with atomic(path) as temporary:
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}, temporary)
    return path
