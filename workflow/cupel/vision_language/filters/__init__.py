"""Ways to flag samples of a training set: BYE and what it is compared with (bye SPEC 7).

`decide(name, evidence, **settings)` runs one by its registered name.
"""

import numpy as np

from cupel.limits import check
from cupel.vision_language.filters.base import MEASURES, Decision, Evidence, Mixture, hazards, matrix, mixture, sample_filter

__all__ = ["MEASURES", "Decision", "Evidence", "Mixture", "decide", "hazards", "matrix", "mixture", "sample_filter"]


def decide(name: str, evidence: Evidence, **given) -> Decision:
    """What the filter `name` flags.

    Raises:
        ValueError: an unknown filter, a setting that it does not have or cannot have, or a decision that is none.
    """
    settings = sample_filter.settings(name, given)
    check("vision_language", "defences", name, sample_filter.find(name), settings)
    decision = sample_filter.find(name)(evidence, **settings)
    if not isinstance(decision, Decision):
        raise ValueError(f"filter {name!r} must return a Decision, but returned {type(decision).__name__}")
    for what, values, wanted in (("flagged", decision.flagged, "bool"), ("score", decision.score, "float64")):
        if values is not None and (np.shape(values) != (len(evidence),) or values.dtype != wanted):
            raise ValueError(f"filter {name!r}: {what} is {values.dtype} {list(np.shape(values))}, not {wanted} "
                             f"[{len(evidence)}]")
    return decision
