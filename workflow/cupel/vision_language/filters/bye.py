"""BYE itself: sensitive layers, aggregated entropy, the low component of a mixture (bye SPEC 2.5 to 2.7)."""

from cupel.vision_language.filters.base import Decision, Evidence, sample_filter

TAU = 2.0


@sample_filter("bye")
def bye(evidence: Evidence, *, rule: str = "sum", tau: float = TAU) -> Decision:
    """The low component of the mixture on the mean over the sensitive layers; nothing without a sensitive layer.

    Args:
        evidence: of the samples.
        rule: `sum` (official code) or `rss` (paper); see `Mixture.passes`. Both are in the record whatever is chosen.
        tau: threshold of the test.

    Returns:
        The decision. Its record holds: rule, tau, samples, replaced (values that were not finite), layers (mixture and both
        BSI of each), sensitive_by_rule (`rss`, `sum`), sensitive, message, aggregated (mixture) and flagged (count).

    Raises:
        ValueError: an unknown rule.
    """
    layers = evidence.layers
    sensitive = evidence.sensitive(rule, tau)
    score, second = evidence.aggregated(sensitive)
    flagged = second.low if second else evidence.none()
    count = int(flagged.sum())
    message = (f"{len(sensitive)} of {len(layers)} layers are sensitive; {count} of {len(evidence)} samples flagged"
               if sensitive else f"no sensitive layer at tau = {tau:g} (rule {rule}): nothing is flagged")
    return Decision(flagged, score, {
        "rule": rule, "tau": tau, "samples": len(evidence), "replaced": evidence.replaced,
        "layers": [{"layer": k, **layer.record()} for k, layer in enumerate(layers)],
        "sensitive_by_rule": {test: list(evidence.sensitive(test, tau)) for test in ("rss", "sum")},
        "sensitive": list(sensitive), "message": message, "aggregated": second.record() if second else None,
        "flagged": count})
