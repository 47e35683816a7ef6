"""Defences, one file each, with one interface: `purify(name, victim, budget, rng, **hyperparameters)`."""

import numpy as np

from cupel.defenses.base import Budget, defence

DEFENCES = defence

__all__ = ["DEFENCES", "Budget", "defence", "purify"]


def purify(name: str, victim, budget: Budget, rng: np.random.Generator, **hyperparameters):
    """Run a defence on a victim.

    Args:
        name: registered name, e.g. `fst`.
        victim: `cupel.models.Classifier`; it is not changed.
        budget: the defender's clean data.
        rng: the only source of randomness.
        hyperparameters: keyword arguments of the defence.

    Returns:
        The purified model and its history, a list of flat records.

    Raises:
        ValueError: unknown name or hyperparameter.
    """
    function = DEFENCES.find(name)
    unknown = set(hyperparameters) - set(function.__kwdefaults__ or {})
    if unknown:
        raise ValueError(f"defence {name} has no hyperparameter {', '.join(sorted(unknown))}; "
                         f"it has {', '.join(sorted(function.__kwdefaults__ or {}))}")
    return function(victim, budget, rng, **hyperparameters)
