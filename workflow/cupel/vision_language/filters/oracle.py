"""Removal by the truth: what no filter can do better than, and the dose of a dose-response curve."""

import numpy as np

from cupel.rng import rng
from cupel.vision_language.filters.base import Decision, Evidence, sample_filter


@sample_filter("oracle")
def oracle(evidence: Evidence, *, recall: float = 1.0) -> Decision:
    """round(recall · K) of the K poisoned samples, drawn uniformly, and no clean one.

    What a lower recall finds, a higher one finds too.
    """
    where, flagged = np.flatnonzero(evidence.poisoned), evidence.none()
    flagged[rng(evidence.seed, "oracle").permutation(where)[: round(recall * len(where))]] = True
    return Decision(flagged)
