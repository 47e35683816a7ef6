"""Repairs of the software stack that must happen before a package is imported."""

import importlib.machinery
import importlib.util
import sys

import torch

# A Library withdraws its operators when it is garbage-collected, so it lives as long as the process.
_stand_in: torch.library.Library | None = None


def ensure_torchvision() -> None:
    """Make ``import torchvision`` (and transformers' image classes) work on a torch it was not compiled for.

    torchvision's wheels of the package index are CUDA builds. Beside a CPU build of torch their compiled part cannot
    load, and the import stops with ``operator torchvision::nms does not exist``. Models, transforms and datasets need
    no compiled operator; it is enough to declare the two whose Python side is registered unconditionally. Calling
    ``torchvision.ops.nms`` then still raises.

    Call it before the first import of torchvision or transformers; later and repeated calls do nothing. Where the
    compiled part loads (every matching pair of wheels, on GPU or CPU), it does nothing but load it.
    """
    global _stand_in
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return
    if _extension_loads():
        return
    _stand_in = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _stand_in.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _extension_loads() -> bool:
    """Try torchvision's compiled part the way torchvision does, without importing torchvision (which could fail)."""
    package = importlib.util.find_spec("torchvision")
    if package is None:
        return True  # nothing to repair: the import will say that torchvision is not installed
    extension = importlib.machinery.PathFinder.find_spec("_C", package.submodule_search_locations)
    if extension is None or extension.origin is None:
        return False
    try:
        # Loading twice is harmless, so torchvision may load it again on import. A failure (missing CUDA libraries,
        # other ABI) comes before any operator is registered.
        torch.ops.load_library(extension.origin)
    except (ImportError, OSError):
        return False
    return True
