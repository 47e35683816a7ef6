"""BYE with one of its parts replaced: the ablations of the paper."""

import numpy as np

from cupel.vision_language.filters.base import THRESHOLD, Decision, Evidence, mixture, sample_filter
from cupel.vision_language.filters.bye import TAU


@sample_filter("without_bsi")
def without_bsi(evidence: Evidence) -> Decision:
    """Without the choice of layers (w/o BSI): the low component of the mixture on the mean over all layers."""
    score = evidence.values.mean(1)
    return Decision(mixture(score).low, score)


@sample_filter("without_gmm")
def without_gmm(evidence: Evidence, *, threshold: float | str = THRESHOLD, rule: str = "sum", tau: float = TAU) -> Decision:
    """Without the second mixture (w/o GMM): aggregated entropy of the sensitive layers below a threshold (see `Evidence.nats`).

    Nothing is flagged without a sensitive layer.
    """
    score, _ = evidence.aggregated(evidence.sensitive(rule, tau))
    return Decision(evidence.none() if score is None else score < evidence.nats(threshold), score)


@sample_filter("fixed_threshold")
def fixed_threshold(evidence: Evidence, *, threshold: float | str = THRESHOLD) -> Decision:
    """Without both: mean entropy over all layers below a threshold (see `Evidence.nats`)."""
    score = evidence.values.mean(1)
    return Decision(score < evidence.nats(threshold), score)


@sample_filter("two_means")
def two_means(evidence: Evidence, *, rule: str = "sum", tau: float = TAU) -> Decision:
    """The cluster with the lower centre of 2-means on the aggregated entropy; nothing without a sensitive layer.

    The paper does not give the settings of its K-means; these are scikit-learn's with 10 starts and a fixed state.
    """
    from sklearn.cluster import KMeans

    score, _ = evidence.aggregated(evidence.sensitive(rule, tau))
    if score is None or len(np.unique(score)) < 2:
        return Decision(evidence.none(), score)
    found = KMeans(n_clusters=2, n_init=10, random_state=0).fit(score[:, None])
    return Decision(found.labels_ == int(found.cluster_centers_[:, 0].argmin()), score)
