"""Intervals of differences that contain the variation between trainings and the finite test set.

The settings of a grid were chosen, not drawn: an effect is the mean, or the least, over just these. What is drawn are the
trainings (seeds) and the test samples. Trainings with one seed share much (the order of data, what is held out), so a seed
is a block: its effects are averaged over settings first, and the blocks are compared by Student's t, which is exact for
normal blocks whatever their variances and correlations within a block. Three blocks have two degrees of freedom; that is
what three seeds can carry. Blocks that happen to lie close together are not believed: their variance is not taken smaller
than what independent settings of the variance seen would give. The test samples are the same for all seeds and most
settings, so their error does not shrink with either; it is added to the half-width in quadrature.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True)
class Effect:
    """An effect with its 95 % interval, the seeds behind it, and the place of the setting in which it is least."""

    value: float
    low: float
    high: float
    seeds: int
    least: int


def half_width(values: np.ndarray, error: float, tail: float) -> float:
    """Distance of a bound from the mean over settings and seeds.

    Args:
        values: float [J, K], of setting and seed.
        error: standard error from the finite test set, common to all of them.
        tail: probability beyond the bound.

    Returns:
        NaN where one seed and no error of the test set say nothing.
    """
    settings, seeds = values.shape
    if seeds == 1:
        return norm.isf(tail) * error or float("nan")  # nothing is known of the error of a metric without an interval
    variance = max(values.mean(0).var(ddof=1), values.var(1, ddof=1).mean() / settings)
    return float(np.hypot(student.isf(tail, seeds - 1) * np.sqrt(variance / seeds), norm.isf(tail) * error))


def mean_effect(values: np.ndarray, errors: np.ndarray) -> Effect:
    """Mean over settings.

    Args:
        values: float [J, K], effect of setting and seed.
        errors: float [J, K], its standard error from the finite test set. They are taken as fully dependent.
    """
    value, half = float(values.mean()), half_width(values, float(errors.mean()), (1 - LEVEL) / 2)
    return Effect(value, value - half, value + half, values.shape[1], int(values.mean(1).argmin()))


def least_effect(values: np.ndarray, errors: np.ndarray) -> Effect:
    """Effect in the setting where it is least; arguments as in `mean_effect`.

    The lower bound is the least of the settings' own lower bounds, which needs no correction: to be above a margin
    everywhere, each setting must be (intersection-union test, Berger, Technometrics 24, 1982). The upper bound is the
    least of their upper bounds, corrected for their number (Bonferroni).
    """
    tail, means = (1 - LEVEL) / 2, values.mean(1)
    error = errors.mean(1)
    low = min(means[j] - half_width(values[j : j + 1], error[j], tail) for j in range(len(values)))
    high = min(means[j] + half_width(values[j : j + 1], error[j], tail / len(values)) for j in range(len(values)))
    return Effect(float(means.min()), float(low), float(high), values.shape[1], int(means.argmin()))
