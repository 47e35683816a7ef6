"""Image classifiers: data sets, attacks, models, defences, and the stages from one to the next.

    from cupel import images

    train = images.load("data/images/cifar10", "train")
    attack = images.attack("badnets", size=3)
    victim = images.load_model("results/demo/images/victims/.../model.safetensors")
    purified, history = images.purify("fst", victim, budget, rng(0, "mine"))
"""

import importlib

#: what stands at hand under this package, and where it lives; nothing is imported before it is asked for
_AT_HAND = {
    "Dataset": "datasets:Dataset", "load": "datasets:load", "prepare": "datasets:prepare", "describe": "datasets:describe",
    "attack": "attacks:build", "build": "models:build", "load_model": "models:load", "save_model": "models:save",
    "ATTACKS": "attacks:ATTACKS", "DEFENCES": "defences:DEFENCES", "MODELS": "models:MODELS",
    "Budget": "defences:Budget", "purify": "defences:purify", "evaluate": "stages:evaluate",
}

__all__ = sorted(_AT_HAND)


def __getattr__(name: str):
    if name not in _AT_HAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; at hand are {', '.join(__all__)}")
    module, _, attribute = _AT_HAND[name].partition(":")
    found = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return found.fill() if name in ("ATTACKS", "DEFENCES", "MODELS") else found  # whoever asks for all wants all
