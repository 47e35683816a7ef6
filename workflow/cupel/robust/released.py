"""The authors' released networks (proper_interpretability SPEC 5, 9.1): a pickled list of (weight, bias) in TensorFlow's
layout, then (W,).

A pickle can call anything. This reader lets it name four things of NumPy, puts harmless stand-ins in their place, and
refuses every other file.
"""

import os
import pickle

import numpy as np
import torch

from cupel.robust.models import GapClassifier, SameConv2d, blank


class NotReleased(pickle.UnpicklingError, ValueError):
    """The file is no pickled list of float arrays, or it does not fit the network."""


class _Kind:
    """Stands for `numpy.dtype`: 4- or 8-byte floats only."""

    def __init__(self, code, *_):
        if code not in ("f4", "f8"):
            raise NotReleased(f"dtype {code!r} is refused: only f4 and f8 arrays are read")
        self.code = code

    def __setstate__(self, state):
        self.code = {"<": "<", ">": ">"}[state[1]] + self.code


class _Array:
    """Stands for `numpy.ndarray`."""

    value = None

    def __init__(self, *_):
        raise NotReleased("numpy.ndarray may not be called: arrays come from _reconstruct only")

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Kind) or not isinstance(data, bytes):
            raise NotReleased("an array of objects is refused: only raw float data is read")
        self.value = np.frombuffer(data, kind.code).reshape(shape, order="F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
    # The two callables are bound methods: unlike functions, nothing in a pickle can set attributes on them.

    def find_class(self, module, name):
        known = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Kind}
        for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
            known |= {(core, "_reconstruct"): self._reconstruct, (core, "scalar"): self._scalar}
        if (module, name) not in known:
            raise NotReleased(f"the pickle asks for {module}.{name}, which is refused: weights need NumPy arrays only")
        return known[module, name]

    def persistent_load(self, pid):
        raise NotReleased("the pickle refers to an object outside of itself, which is refused")

    def _reconstruct(self, kind, *_):
        if kind is not _Array:
            raise NotReleased("_reconstruct may make numpy.ndarray only")
        return _Array.__new__(_Array)

    def _scalar(self, kind, data):
        array = _Array.__new__(_Array)
        array.__setstate__((1, (), kind, False, data))
        return array


def read(path: str | os.PathLike[str]) -> list[tuple[np.ndarray, ...]]:
    """The arrays of a released file, one tuple per layer, without executing anything.

    Raises:
        FileNotFoundError: no such file.
        NotReleased: the file holds, or calls, anything but float arrays; nothing of it was run.
    """
    with open(path, "rb") as file:
        try:
            layers = _Unpickler(file).load()
        except NotReleased as error:
            raise NotReleased(f"{path}: {error}") from None
        except Exception as error:
            raise NotReleased(f"{path} is no pickle of float arrays: {type(error).__name__}: {error}") from error
    good = isinstance(layers, list) and layers and all(isinstance(layer, tuple) and layer for layer in layers)
    if not good or any(not isinstance(array, _Array) or array.value is None for layer in layers for array in layer):
        raise NotReleased(f"{path}: expected a list of tuples of arrays, one tuple per layer")
    return [tuple(array.value for array in layer) for layer in layers]


def load(path: str | os.PathLike[str], name: str) -> GapClassifier:
    """A released network, float32, on the CPU: e.g. networks/mnist_smallgap_int_100.pkl of the authors' repository.

    Its `name` is e.g. `small` (there: smallgap); channels and classes are read from the file.

    Raises:
        FileNotFoundError: no such file.
        NotReleased: see :func:`read`; or the weights do not fit `name`, or are not finite (some released ones are not).
        ValueError: an unknown name.
    """
    # pooling layers have placeholders in the list: NaN, with a bias that is a scalar
    layers = [[torch.tensor(array.astype(np.float32)) for array in layer] for layer in read(path)
              if len(layer) == 1 or layer[1].ndim]
    shapes = [[tuple(array.shape) for array in layer] for layer in layers]
    if any(len(layer[0]) != 4 for layer in shapes):
        raise NotReleased(f"{path}: weights must have shape [rows, columns, in, out], found {shapes}")
    model = blank(name, num_classes=shapes[-1][0][3], in_channels=shapes[0][0][2])
    wanted = [layer for layer in model.modules() if isinstance(layer, SameConv2d)]
    if [len(layer) for layer in layers] != [2] * len(wanted) + [1]:
        raise NotReleased(f"{path}: network {name!r} has {len(wanted)} convolutions and a head, "
                          f"the file has {len(layers)} layers")
    with torch.no_grad():
        for number, (layer, arrays) in enumerate(zip([*wanted, model.head], layers, strict=True)):
            weight = arrays[0].permute(3, 2, 0, 1)
            values = [weight[:, :, 0, 0] if layer is model.head else weight, *arrays[1:]]
            for parameter, value in zip(layer.parameters(), values, strict=True):
                if parameter.shape != value.shape:
                    raise NotReleased(f"{path}: layer {number} of network {name!r} needs {tuple(parameter.shape)}, the "
                                      f"file has {tuple(value.shape)}")
                if not value.isfinite().all():
                    raise NotReleased(f"{path}: layer {number} has weights that are not finite: of no use")
                parameter.copy_(value)
    return model
