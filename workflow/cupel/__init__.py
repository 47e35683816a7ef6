"""Cupel: five papers on removing backdoors and on robustness, reproduced in one pipeline.

The library knows nothing of Snakemake: every function here can be called from a notebook as well.

    experiment       what the papers ask for at a scale: cells and their settings; one planner for all families
    images           image classifiers: datasets, attacks, models, defences, stages
    robust           robust training: objectives, evaluations, stages
    text             language models: data, triggers, defences, scoring, stages
    vision_language  vision-language models: datasets, triggers, filters, models, stages
    training         the engine for classifiers, the loop for adapters, checkpoints
    evaluation       ACC, ASR, RA, their intervals, and the verdict on a claim
    reporting        tables, figures and pages that no paper owns
    own              a checkpoint of yours: `cupel.purify(model, images, labels, ...)`, and the command `cupel`
    paths, digest    where everything lies; what a job's code means
"""

import importlib

__version__ = "0.1.0"

#: what stands at hand, and where it lives; nothing is imported before it is asked for
_AT_HAND = {"purify": "own.run:purify", "images": "images:"}

__all__ = ["__version__", *_AT_HAND]


def __getattr__(name: str):
    if name not in _AT_HAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; at hand are {', '.join(_AT_HAND)}")
    module, _, attribute = _AT_HAND[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    return getattr(found, attribute) if attribute else found
