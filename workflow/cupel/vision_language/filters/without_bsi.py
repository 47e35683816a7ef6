"""BYE without its choice of layers (w/o BSI)."""

from cupel.vision_language.filters.base import Decision, Evidence, mixture, sample_filter


@sample_filter("without_bsi")
def without_bsi(evidence: Evidence) -> Decision:
    """The low component of the mixture on the mean over all layers."""
    score = evidence.values.mean(1)
    return Decision(mixture(score).low, score)
