"""Removal by chance: what any filter must do better than."""

from cupel.rng import rng
from cupel.vision_language.filters.base import Decision, Evidence, sample_filter


@sample_filter("random_drop")
def random_drop(evidence: Evidence, *, share: float = 0.2) -> Decision:
    """⌊share · N⌋ samples drawn uniformly without replacement."""
    flagged = evidence.none()
    flagged[rng(evidence.seed, "random_drop").permutation(len(evidence))[: int(share * len(evidence))]] = True
    return Decision(flagged)
