"""The filter of BYE: sensitive layers, aggregated entropy, the low component of a mixture (bye SPEC 2.5 to 2.7).

Only numpy and scikit-learn; entropies come from `cupel.vision_language.entropy`. Everything that the figures need stands in the
record that `run` returns.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

TAU = 2.0
TAUS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # of the paper's Table 5


@dataclass(frozen=True)
class Mixture:
    """Two normal components in one dimension, the one with the lower mean first.

    Attributes:
        mean, sd, weight: of the components; None where there is no such thing (all values equal).
        low: bool [N], hard assignment to the component with the lower mean.
    """

    mean: tuple[float, float] | None
    sd: tuple[float, float] | None
    weight: tuple[float, float] | None
    low: np.ndarray

    @property
    def rss(self) -> float:
        """|μ₁ − μ₂| / √(σ₁² + σ₂²): the paper's BSI (Eq. 7; the root is inferred, bye SPEC 2.5)."""
        return self._separation(float(np.hypot(*self.sd))) if self.sd else 0.0

    @property
    def sum(self) -> float:
        """|μ₁ − μ₂| / (σ₁ + σ₂): what the official code compares with 2.0."""
        return self._separation(sum(self.sd)) if self.sd else 0.0

    def _separation(self, spread: float) -> float:
        return (self.mean[1] - self.mean[0]) / spread

    @property
    def kl(self) -> float:
        """KL(low ‖ high) of the two normals: computed and drawn by the official code, not used by it."""
        if not self.sd:
            return 0.0
        (a, b), (s, t) = self.mean, self.sd
        return float(np.log(t / s) + (s**2 + (a - b) ** 2) / (2 * t**2) - 0.5)

    def record(self) -> dict:
        """JSON-able parameters and separations."""
        return {"mean": self.mean, "sd": self.sd, "weight": self.weight, "bsi_rss": self.rss, "bsi_sum": self.sum,
                "kl": self.kl, "share_low": float(self.low.mean()) if len(self.low) else 0.0}


def mixture(values: np.ndarray) -> Mixture:
    """Two-component normal mixture with the official settings (`GaussianMixture(2, random_state=0)`).

    Args:
        values: float [N], finite. Fewer than two distinct values make no mixture: nothing is low.
    """
    from sklearn.mixture import GaussianMixture

    values = np.asarray(values, np.float64)
    if len(np.unique(values)) < 2:
        return Mixture(None, None, None, np.zeros(len(values), bool))
    column = values[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no convergence within 100 steps: the official code goes on too
        model = GaussianMixture(n_components=2, random_state=0).fit(column)
    order = np.argsort(model.means_[:, 0], kind="stable")
    low = model.predict(column) == order[0]
    pair = [tuple(float(value) for value in part[order])
            for part in (model.means_[:, 0], np.sqrt(model.covariances_[:, 0, 0]), model.weights_)]
    return Mixture(*pair, low)


def filled(entropies: np.ndarray) -> tuple[np.ndarray, int]:
    """Entropies with every value that is not finite replaced by its layer's mean (official code), and how many were.

    A layer without any finite value becomes 0 throughout, which no test takes for two components.
    """
    entropies = np.array(entropies, np.float64)
    bad = ~np.isfinite(entropies)
    sums, counts = np.where(bad, 0, entropies).sum(0), (~bad).sum(0)
    entropies[bad] = np.broadcast_to(sums / np.maximum(counts, 1), entropies.shape)[bad]
    return entropies, int(bad.sum())


def passes(component: Mixture, rule: str, tau: float) -> bool:
    """Whether a layer is sensitive.

    `rss` (paper, Eq. 7): BSI >= tau. `sum` (official code): |μ₁ − μ₂| > tau (σ₁ + σ₂), strictly. No mixture never passes.
    """
    if rule not in ("rss", "sum"):
        raise ValueError(f"rule {rule!r}: must be rss (paper) or sum (official code)")
    if component.sd is None:
        return False
    return component.rss >= tau if rule == "rss" else component.sum > tau


@dataclass(frozen=True)
class Hazards:
    """What can go wrong with the second mixture (bye SPEC 2.7).

    Attributes:
        share_flagged: of all samples.
        majority_removed: more than half is flagged.
        largest_flagged, smallest_kept: of the aggregated entropy; None where a side is empty.
        non_monotone: a flagged sample has a higher aggregated entropy than one that is kept.
    """

    share_flagged: float
    majority_removed: bool
    largest_flagged: float | None
    smallest_kept: float | None
    non_monotone: bool

    @classmethod
    def of(cls, flagged: np.ndarray, score: np.ndarray | None) -> "Hazards":
        """Of a filter's decision and the aggregated entropy."""
        share = float(flagged.mean()) if len(flagged) else 0.0
        if score is None or not flagged.any() or flagged.all():
            return cls(share, share > 0.5, None, None, False)
        top, bottom = float(score[flagged].max()), float(score[~flagged].min())
        return cls(share, share > 0.5, top, bottom, top > bottom)


@dataclass(frozen=True)
class Filtered:
    """A filter's decision.

    Attributes:
        flagged: bool [N].
        score: aggregated entropy float64 [N]; None where no layer is sensitive.
        sensitive: numbers of the layers used.
        record: JSON-able account of everything.
    """

    flagged: np.ndarray
    score: np.ndarray | None
    sensitive: list[int]
    record: dict


def run(entropies: np.ndarray, *, rule: str = "sum", tau: float = TAU, taus: Sequence[float] = TAUS) -> Filtered:
    """Find the samples to remove.

    Args:
        entropies: float [N, L], nats.
        rule: `sum` (official code) or `rss` (paper); see `passes`. Both are in the record whatever is chosen.
        tau: threshold of the test.
        taus: for the sweep in the record.

    Returns:
        The decision. Without a sensitive layer nothing is flagged, and the record's message says so. The record holds:
        rule, tau, samples, replaced (values that were not finite), layers (mixture and both BSI of each),
        sensitive_by_rule (`rss`, `sum`), sensitive, message, aggregated (mixture), flagged (count), hazards, and sweep
        (per rule and tau: sensitive layers, number flagged).

    Raises:
        ValueError: no matrix, fewer than two samples, or an unknown rule.
    """
    if np.ndim(entropies) != 2 or len(entropies) < 2:
        raise ValueError(f"entropies of shape {np.shape(entropies)}: a matrix [N, L] with N >= 2 is wanted")
    values, replaced = filled(entropies)
    layers = [mixture(values[:, k]) for k in range(values.shape[1])]
    cache: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray | None, Mixture | None]] = {}

    def decide(test: str, threshold: float):
        chosen = tuple(k for k, layer in enumerate(layers) if passes(layer, test, threshold))
        if chosen not in cache:
            score = values[:, chosen].mean(1) if chosen else None
            second = mixture(score) if chosen else None
            cache[chosen] = (second.low if chosen else np.zeros(len(values), bool)), score, second
        return list(chosen), *cache[chosen]

    sensitive, flagged, score, second = decide(rule, tau)
    by_rule = {test: decide(test, tau)[0] for test in ("rss", "sum")}
    sweep = [{"rule": test, "tau": threshold, "sensitive": decide(test, threshold)[0],
              "flagged": int(decide(test, threshold)[1].sum())} for test in ("rss", "sum") for threshold in taus]
    message = (f"{len(sensitive)} of {len(layers)} layers are sensitive; {int(flagged.sum())} of {len(values)} samples flagged"
               if sensitive else f"no sensitive layer at tau = {tau:g} (rule {rule}): nothing is flagged")
    record = {
        "rule": rule, "tau": tau, "samples": len(values), "replaced": replaced,
        "layers": [{"layer": k, **layer.record()} for k, layer in enumerate(layers)],
        "sensitive_by_rule": by_rule, "sensitive": sensitive, "message": message,
        "aggregated": second.record() if second else None, "flagged": int(flagged.sum()),
        "hazards": asdict(Hazards.of(flagged, score)), "sweep": sweep}
    return Filtered(flagged, score, sensitive, record)
