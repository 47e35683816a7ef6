"""BYE with K-means instead of its second mixture."""

import numpy as np

from cupel.vision_language.filters.base import Decision, Evidence, sample_filter
from cupel.vision_language.filters.bye import TAU


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
