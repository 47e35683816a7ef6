"""What a filter is held against: removal by the truth and by chance."""

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


@sample_filter("random_drop")
def random_drop(evidence: Evidence, *, share: float = 0.2) -> Decision:
    """⌊share · N⌋ samples drawn uniformly without replacement."""
    flagged = evidence.none()
    flagged[rng(evidence.seed, "random_drop").permutation(len(evidence))[: int(share * len(evidence))]] = True
    return Decision(flagged)
