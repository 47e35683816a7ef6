"""Intervals of differences between cells."""

import numpy as np

DRAWS, LEVEL = 4000, 0.95


def paired_bootstrap(first: np.ndarray, second: np.ndarray, n: np.ndarray, clusters: np.ndarray,
                     rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean of first − second over cells, with a two-stage bootstrap interval of `LEVEL`, from `DRAWS` draws.

    Stage one draws clusters with replacement (a cluster is one setting: data set, model, attack, rate; its seeds stay
    together), stage two draws each rate anew from its binomial, so that the finite test set counts as well.

    Args:
        first, second: rates in [0, 1] of the two sides, float [C].
        n: test images behind each rate, int [C, 2]; 0 for derived metrics without a count.
        clusters: int [C].

    Returns:
        effect, low, high.
    """
    def drawn(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        # derived metrics, such as DER, have no count: their test-set error is not drawn
        counted = rng.binomial(counts, np.clip(values, 0, 1)) / np.maximum(counts, 1)
        return np.where(counts > 0, counted, values)

    effect = float(np.mean(first - second))
    members = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    samples = np.empty(DRAWS)
    for k in range(DRAWS):
        cells = np.concatenate([members[c] for c in rng.integers(len(members), size=len(members))])
        samples[k] = np.mean(drawn(first[cells], n[cells, 0]) - drawn(second[cells], n[cells, 1]))
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return effect, float(low), float(high)
