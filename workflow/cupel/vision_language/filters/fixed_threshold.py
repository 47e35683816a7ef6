"""BYE with a threshold on all layers: without GMM and without BSI."""

from cupel.vision_language.filters.base import THRESHOLD, Decision, Evidence, sample_filter


@sample_filter("fixed_threshold")
def fixed_threshold(evidence: Evidence, *, threshold: float | str = THRESHOLD) -> Decision:
    """Mean entropy over all layers below a threshold (see `Evidence.nats`)."""
    score = evidence.values.mean(1)
    return Decision(score < evidence.nats(threshold), score)
