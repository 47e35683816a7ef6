"""Defences, one file each, with one interface: `purify(name, victim, budget, rng, **hyperparameters)`."""

import inspect
from dataclasses import replace

import numpy as np

from cupel.images.defences.base import Budget, defence
from cupel.limits import check
from cupel.training.resume import Resume, fingerprint

DEFENCES = defence

__all__ = ["DEFENCES", "Budget", "defence", "purify"]


def purify(name: str, victim, budget: Budget, rng: np.random.Generator | int, **hyperparameters):
    """Run a defence on a victim.

    Args:
        name: registered name, e.g. `fst`.
        victim: `cupel.images.models.Classifier`; it is not changed.
        budget: the defender's clean data; with a checkpoint, a killed run of the same arguments is continued.
        rng: the only source of randomness, or a seed for one.
        hyperparameters: keyword arguments of the defence.

    Returns:
        The purified model and its history, a list of flat records.

    Raises:
        ValueError: unknown name or hyperparameter, or a value that is none for it.
        TypeError: it returns anything else; the text names its file.
    """
    settings, rng = DEFENCES.settings(name, hyperparameters), np.random.default_rng(rng)
    check("images", "defences", name, DEFENCES[name], hyperparameters)
    if budget.checkpoint:
        weights = victim.state_dict()
        identity = {"defence": name, "hyperparameters": settings,
                    "victim": [*weights, fingerprint(weights.values())], "stream": rng.bit_generator.state,
                    "data": fingerprint((budget.images, budget.labels)),
                    **{name: str(getattr(budget, name)) for name in ("classes", "crop", "flip", "device", "precision")}}
        budget = replace(budget, checkpoint=Resume(budget.checkpoint, identity, budget.device))
    found = DEFENCES[name](victim, budget, rng, **settings)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], list)):
        what = f"{len(found)} objects" if isinstance(found, tuple) else f"a {type(found).__name__}"
        raise TypeError(f"defence {name} in {inspect.getfile(DEFENCES[name])} must return the network and its history, a list "
                        f"(which may be empty): it returns {what}")
    return found
