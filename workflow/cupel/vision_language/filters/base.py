"""What a filter is given and what it gives back, and the mixture of two normals that several of them fit (bye SPEC 2.5).

A filter is a function of `Evidence` and of its own settings as keyword arguments, registered by `@sample_filter("name")`,
here or in a plugin. Only numpy and scikit-learn: what makes the entropies is not needed to judge them.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from cupel.registry import Registry

#: of entropy: the paper's, and the one of EntropyScan (arXiv 2605.15711), which judges models by it
MEASURES = ("shannon", "tsallis")

sample_filter = Registry("filter", "cupel.vision_language.filters")

#: nats, of the paper, for both of its models (bye SPEC 7)
THRESHOLD = 4.5
#: the same as a share of the largest possible entropy ln 576 of LLaVA-1.5 (bye SPEC 11.3)
THRESHOLD_SHARE = 0.708
#: smallest standard deviation of a component: the root of scikit-learn's reg_covar
FLOOR = 1e-3


@dataclass(frozen=True)
class Mixture:
    """Two normal components in one dimension, the one with the lower mean first.

    Attributes:
        mean, sd, weight: of the components; None where there is no such thing (all values equal).
        low: bool [N], hard assignment to the component with the lower mean.
        gain: log-likelihood that two components have over one normal, nats per sample; it does not change with the unit of
            the values.
    """

    mean: tuple[float, float] | None
    sd: tuple[float, float] | None
    weight: tuple[float, float] | None
    low: np.ndarray
    gain: float = 0.0

    @property
    def rss(self) -> float:
        """|μ₁ − μ₂| / √(σ₁² + σ₂²): the paper's BSI (Eq. 7; the root is inferred, bye SPEC 2.5)."""
        return (self.mean[1] - self.mean[0]) / float(np.hypot(*self.sd)) if self.sd else 0.0

    @property
    def sum(self) -> float:
        """|μ₁ − μ₂| / (σ₁ + σ₂): what the official code compares with 2.0."""
        return (self.mean[1] - self.mean[0]) / sum(self.sd) if self.sd else 0.0

    def passes(self, rule: str, tau: float) -> bool:
        """Whether a layer with this mixture is sensitive.

        `rss` (paper, Eq. 7): BSI >= tau. `sum` (official code): |μ₁ − μ₂| > tau (σ₁ + σ₂), strictly. No mixture never passes.
        """
        if rule not in ("rss", "sum"):
            raise ValueError(f"rule {rule!r}: must be rss (paper) or sum (official code)")
        return self.sd is not None and (self.rss >= tau if rule == "rss" else self.sum > tau)

    def record(self) -> dict:
        """JSON-able parameters and separations."""
        return {"mean": self.mean, "sd": self.sd, "weight": self.weight, "bsi_rss": self.rss, "bsi_sum": self.sum,
                "gain": self.gain}


def mixture(values: np.ndarray, *, constant: bool = False, starts: int = 1) -> Mixture:
    """Two-component normal mixture with the official settings (`GaussianMixture(2, random_state=0)`).

    Args:
        values: float [N], finite. Fewer than two distinct values make no mixture: nothing is low.
        constant: fit them all the same, as the official code does: one component lands on the value and the other, which
            holds no sample, on 0, so that the two count as far apart.
        starts: of the fit, the likeliest of which is taken; the official code has one.
    """
    from sklearn.mixture import GaussianMixture

    values = np.asarray(values, np.float64)
    if len(np.unique(values)) < 2 and not constant:
        return Mixture(None, None, None, np.zeros(len(values), bool))
    column = values[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no convergence within 100 steps: the official code goes on too
        model = GaussianMixture(n_components=2, random_state=0, n_init=starts).fit(column)
    order = np.argsort(model.means_[:, 0], kind="stable")
    low = model.predict(column) == order[0]
    one = -np.log(max(values.std(), FLOOR)) - 0.5 * np.log(2 * np.pi * np.e)
    pair = [tuple(float(value) for value in part[order])
            for part in (model.means_[:, 0], np.sqrt(model.covariances_[:, 0, 0]), model.weights_)]
    return Mixture(*pair, low, float(model.score(column) - one))


@dataclass(frozen=True)
class Decision:
    """What a filter says.

    Attributes:
        flagged: bool [N], samples to remove.
        score: float64 [N] that it looks at, lower for more suspicious; None where it has none.
        record: JSON-able account, or None.
    """

    flagged: np.ndarray
    score: np.ndarray | None = None
    record: dict | None = None


class Evidence:
    """What is known of the training samples of a victim.

    Args:
        entropies: float [N, L], nats.
        image_tokens: T.
        seed: of random filters.
        poisoned: bool [N], the truth, for the oracle alone.
        others: entropies by other measures (`MEASURES` but the first), by name, of the form of `entropies`.
        starts: of every mixture, see `mixture`.

    Attributes:
        values: float64 [N, L], the entropies, where every value that is not finite is its layer's mean (official code). A
            layer without any finite value is 0 throughout, which no test takes for two components.
        replaced: how many values were not finite.

    Raises:
        ValueError: no matrix, fewer than two samples, or no finite value at all.
    """

    def __init__(self, entropies: np.ndarray, *, image_tokens: int = 576, seed: int = 0, poisoned: np.ndarray | None = None,
                 others: Mapping[str, np.ndarray] | None = None, starts: int = 1):
        if np.ndim(entropies) != 2 or len(entropies) < 2:
            raise ValueError(f"entropies of shape {np.shape(entropies)}: a matrix [N, L] with N >= 2 is wanted")
        self.image_tokens, self.seed, self.poisoned = image_tokens, seed, poisoned
        self.starts, self._others = starts, others or {}
        self.values = np.array(entropies, np.float64)
        bad = ~np.isfinite(self.values)
        if bad.all():
            raise ValueError("no entropy of any layer is finite: the attention of this model cannot be read")
        sums, counts = np.where(bad, 0, self.values).sum(0), (~bad).sum(0)
        self.values[bad] = np.broadcast_to(sums / np.maximum(counts, 1), bad.shape)[bad]
        self.replaced = int(bad.sum())
        self._decided: dict[tuple[int, ...], tuple] = {(): (None, None)}

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def layers(self) -> list[Mixture]:
        """Mixture of each layer."""
        return [mixture(column, starts=self.starts) for column in self.values.T]

    def by(self, measure: str, starts: int = 1) -> "Evidence":
        """The same by another measure of entropy, or with more starts of every mixture.

        Raises:
            ValueError: it was not measured.
        """
        if measure != MEASURES[0] and measure not in self._others:
            raise ValueError(f"entropy {measure!r} was not measured: known are {', '.join((MEASURES[0], *self._others))}")
        if (measure, starts) == (MEASURES[0], self.starts):
            return self
        return Evidence(self._others.get(measure, self.values), image_tokens=self.image_tokens, starts=starts)

    def sensitive(self, rule: str, tau: float, *, constant: bool = False) -> tuple[int, ...]:
        """Numbers of the sensitive layers; see `Mixture.passes`, and `mixture` for `constant`."""
        layers = [mixture(column, constant=True) if constant and layer.mean is None else layer
                  for layer, column in zip(self.layers, self.values.T, strict=True)]
        return tuple(k for k, layer in enumerate(layers) if layer.passes(rule, tau))

    def aggregated(self, layers: Iterable[int]) -> tuple[np.ndarray | None, Mixture | None]:
        """Mean over layers, float64 [N], and its mixture; None for no layers."""
        layers = tuple(layers)
        if layers not in self._decided:
            score = self.values[:, layers].mean(1)
            self._decided[layers] = score, mixture(score, starts=self.starts)
        return self._decided[layers]

    def none(self) -> np.ndarray:
        """Nothing flagged, bool [N]."""
        return np.zeros(len(self), bool)

    def nats(self, threshold: float | str) -> float:
        """A threshold in nats; `scaled` is the paper's for another number of image tokens, 0.708 · ln T."""
        return THRESHOLD_SHARE * float(np.log(self.image_tokens)) if threshold == "scaled" else threshold


def matrix(table: pd.DataFrame, prefix: str = "layer") -> np.ndarray:
    """float64 [N, L] of a table with the columns `layer_0` ... `layer_{L-1}` (see `entropy.extract`), or another prefix."""
    count = sum(name.startswith(f"{prefix}_") for name in table.columns)
    return table[[f"{prefix}_{k}" for k in range(count)]].to_numpy(np.float64)


def hazards(decision: Decision) -> dict:
    """What can go wrong with a second mixture (bye SPEC 2.7).

    Returns:
        share_flagged, of all samples; majority_removed, more than half is flagged; non_monotone, a flagged sample has a higher
        score than one that is kept.
    """
    flagged, score = decision.flagged, decision.score
    share = float(flagged.mean())
    sides = score is not None and flagged.any() and not flagged.all()
    return {"share_flagged": share, "majority_removed": share > 0.5,
            "non_monotone": bool(sides and score[flagged].max() > score[~flagged].min())}
