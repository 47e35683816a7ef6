"""BYE with a threshold instead of its second mixture (w/o GMM)."""

from cupel.vision_language.filters.base import THRESHOLD, Decision, Evidence, sample_filter
from cupel.vision_language.filters.bye import TAU


@sample_filter("without_gmm")
def without_gmm(evidence: Evidence, *, threshold: float | str = THRESHOLD, rule: str = "sum", tau: float = TAU) -> Decision:
    """Aggregated entropy of the sensitive layers below a threshold (see `Evidence.nats`); nothing without such a layer."""
    score, _ = evidence.aggregated(evidence.sensitive(rule, tau))
    return Decision(evidence.none() if score is None else score < evidence.nats(threshold), score)
