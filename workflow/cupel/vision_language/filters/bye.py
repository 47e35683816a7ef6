"""BYE itself: sensitive layers, aggregated entropy, the low component of a mixture (bye SPEC 2.5 to 2.7)."""

from cupel.vision_language.filters.base import Decision, Evidence, sample_filter

TAU = 2.0


@sample_filter("bye")
def bye(evidence: Evidence, *, rule: str = "sum", tau: float = TAU, measure: str = "shannon",
        constant: bool = False, starts: int = 1) -> Decision:
    """The low component of the mixture on the mean over the sensitive layers; nothing without a sensitive layer.

    The decision's record holds rule, tau, replaced (how many values were not finite), sensitive, message, aggregated (mixture).

    Args:
        evidence: of all training samples.
        rule, tau: of the layer test, see `Mixture.passes`.
        measure: of entropy, see `MEASURES`.
        constant: a layer whose entropies are all equal is sensitive, as the official code has it (see `mixture`).
        starts: of every mixture; the official code has one, which can miss the two groups however far apart they lie.

    Raises:
        ValueError: an unknown rule or measure.
    """
    evidence = evidence.by(measure, starts)
    sensitive = evidence.sensitive(rule, tau, constant=constant)
    score, second = evidence.aggregated(sensitive)
    flagged = second.low if second else evidence.none()
    message = (f"{len(sensitive)} of {len(evidence.layers)} layers are sensitive; {flagged.sum()} of {len(evidence)} samples "
               "flagged"
               if sensitive else f"no sensitive layer at tau = {tau:g} (rule {rule}): nothing is flagged")
    return Decision(flagged, score, {
        "rule": rule, "tau": tau, "replaced": evidence.replaced, "sensitive": list(sensitive), "message": message,
        "aggregated": second.record() if second else None})
