"""Rates, intervals, derived metrics and verdicts."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from cupel.evaluation.bootstrap import paired_bootstrap
from cupel.evaluation.claims import judge
from cupel.evaluation.intervals import wilson
from cupel.evaluation.metrics import arr, der, rates, rdr
from cupel.rng import rng


@pytest.mark.parametrize("k,n", [(0, 10), (3, 10), (10, 10), (57, 1800)])
def test_wilson_equals_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(0.95, "wilson")
    assert np.allclose(wilson(k, n), (expected.low, expected.high))


def test_rates_by_hand():
    found = rates(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), np.array([0, 0, 2]), np.array([0, 0, 0]), np.array([1, 2, 2]))
    assert (found["acc"].value, found["asr"].value, found["ra"].value) == (0.75, 2 / 3, 1 / 3)
    assert found["asr"].n == 3 and found["asr"].record("asr")["asr_n"] == 3


def test_derived_metrics_have_the_documented_signs():
    assert der(0.9, 0.9, 1.0, 1.0) == 0.5 and der(0.9, 0.9, 1.0, 0.0) == 1.0
    assert der(0.9, 0.5, 1.0, 0.0) == pytest.approx(0.8)
    assert arr(0.8, 0.6) == pytest.approx(0.25) and rdr(0.8, 0.2) == pytest.approx(0.75) and arr(0.8, 0.9) < 0


def test_bootstrap_covers_the_binomial_error():
    """One cell: the interval is that of a difference of two rates."""
    effect, low, high = paired_bootstrap(np.array([0.8]), np.array([0.3]), np.array([[500, 500]]), np.array([0]), rng(0))
    error = 1.96 * np.sqrt(0.8 * 0.2 / 500 + 0.3 * 0.7 / 500)
    assert (
        effect == pytest.approx(0.5)
        and low == pytest.approx(0.5 - error, abs=0.01)
        and high == pytest.approx(0.5 + error, abs=0.01)
    )


def test_bootstrap_of_metrics_without_a_count():
    none = np.zeros((3, 2), int)
    effect, low, high = paired_bootstrap(np.array([0.5, 0.6, 0.7]), np.array([0.4, 0.4, 0.4]), none, np.arange(3), rng(0))
    assert effect == pytest.approx(0.2) and 0.1 - 1e-9 <= low < effect < high <= 0.3 + 1e-9


def table(ft, fst, failed=()):
    rows = []
    for k, (a, b) in enumerate(zip(ft, fst, strict=True)):
        for defence, value in (("ft", a), ("fst", b)):
            rows.append(
                {
                    "stage": "purified",
                    "dataset": "d",
                    "model": "m",
                    "recipe": "r",
                    "attack": f"a{k}",
                    "poison_rate": 0.01,
                    "seed": 0,
                    "defence": defence,
                    "variant": "",
                    "metric": "asr",
                    "value": value,
                    "n": 1000,
                    "status": "failed" if k in failed else "ok",
                }
            )
    return pd.DataFrame(rows)


CLAIM = {
    "id": "c",
    "statement": "s",
    "source": "x",
    "scales": ["demo"],
    "min_n": 2,
    "test": {"metric": "asr", "a": {"defence": "ft"}, "b": {"defence": "fst"}, "margin": 0.1},
}


def test_verdicts():
    assert judge(CLAIM, table([0.9, 0.8, 0.9], [0.1, 0.1, 0.2]), "demo").verdict == "supported"
    assert judge(CLAIM, table([0.5, 0.5], [0.5, 0.6]), "demo").verdict == "refuted"
    assert judge(CLAIM, table([0.9, 0.1], [0.1, 0.9]), "demo").verdict == "inconclusive"
    assert judge(CLAIM, table([0.9, 0.8], [0.1, 0.1]), "paper").verdict == "not judged at this scale"
    few = judge(CLAIM, table([0.9, 0.8], [0.1, 0.1], failed=(1,)), "demo")
    assert few.verdict == "not judged at this scale" and "at least 2" in few.reason


def test_constant_and_direction():
    claim = {**CLAIM, "test": {"metric": "asr", "a": {"defence": "fst"}, "constant": 0.1, "direction": "less", "margin": 0.0}}
    verdict = judge(claim, table([1, 1], [0.01, 0.02]), "demo")
    assert (
        verdict.verdict == "supported"
        and verdict.effect == pytest.approx(0.085)
        and verdict.low < verdict.effect < verdict.high
    )
