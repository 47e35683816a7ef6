"""How often a verdict is wrong, and how often an effect is found: simulated cells with known variation between trainings.

    python benchmarks/verdicts.py [--trials 2000] [--out folder]

Each trial draws the effects of J settings with K seeds and judges them as `cupel.evaluation.claims` does: in the mean over
settings, and in every setting. The effect of a setting with one seed is its true value, plus what a seed shares over
settings, plus what is its own, plus the error of 9,000 test images, which all seeds share. The worlds:

    even      standard deviation of 5 points between seeds in every setting
    uneven    from 0.5 to 25 points, a factor of 50 between settings
    shared    10 points, half of the variance shared by all settings of a seed
    streams   one of eight measured ASR of FST on one poor victim, over eight orders of its batches (.79 .33 .04 .27 .92 .93
              .84 .82: the victim SIG 2 % with 58 % ACC; mean .62, standard deviation .33)
    rare      9 of 10 seeds alike to 1 point, the tenth 60 points off: no three seeds can know it

A verdict is wrong when the truth lies at the margin and it says `supported` or `refuted`: there the error is largest. For
claims about every setting one setting lies at the margin, and the others 40 points above it. `bootstrap` is what the
project did before: settings drawn with replacement, each rate drawn from its binomial, seeds of a setting kept together.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.evaluation.variation import least_effect, mean_effect
from cupel.rng import rng

STREAMS = np.array([0.79, 0.33, 0.04, 0.27, 0.92, 0.93, 0.84, 0.82])
TEST_ERROR = np.sqrt(2 * 0.25 / 9000)  # of a difference of two rates near one half
WORLDS = ("even", "uneven", "shared", "streams", "rare")


def seeds_of(world: str, settings: int, seeds: int, stream: np.random.Generator) -> np.ndarray:
    """Deviations float [J, K] with mean 0 of each training from the truth of its setting."""
    shape = (settings, seeds)
    if world == "even":
        return stream.normal(0, 0.05, shape)
    if world == "uneven":
        return stream.normal(0, 1, shape) * np.geomspace(0.005, 0.25, settings)[:, None]
    if world == "shared":
        return 0.1 * np.sqrt(0.5) * (stream.normal(0, 1, shape) + stream.normal(0, 1, (1, seeds)))
    if world == "streams":
        return stream.choice(STREAMS, shape) - STREAMS.mean()
    return stream.normal(0, 0.01, shape) - 0.6 * (stream.random(shape) < 0.1) + 0.06


def bootstrap(values: np.ndarray, stream: np.random.Generator, draws: int = 400) -> tuple[float, float]:
    """The interval of before."""
    settings = len(values)
    chosen = stream.integers(settings, size=(draws, settings))
    noise = stream.normal(0, TEST_ERROR, (draws, *values.shape))
    means = (values[chosen] + noise).mean((1, 2))
    return tuple(np.quantile(means, [0.025, 0.975]))


def intervals(world: str, truth: np.ndarray, seeds: int, trials: int) -> dict[str, np.ndarray]:
    """Bounds float [trials, 2] by method, for settings with these true effects."""
    stream, found = rng(0, "verdicts", world, str(len(truth)), str(seeds)), {"t, mean": [], "t, every": [], "bootstrap": []}
    errors = np.full((len(truth), seeds), TEST_ERROR)
    for _ in range(trials):
        values = (truth[:, None] + seeds_of(world, len(truth), seeds, stream)
                  + stream.normal(0, TEST_ERROR, (len(truth), 1)))
        for name, method in (("t, mean", mean_effect), ("t, every", least_effect)):
            effect = method(values, errors)
            found[name].append((effect.low, effect.high))
        found["bootstrap"].append(bootstrap(values, stream))
    return {name: np.array(bounds) for name, bounds in found.items()}


def simulate(trials: int) -> pd.DataFrame:
    """Shares of trials: `wrong` verdicts at the margin, and effects of 10, 20 and 40 points that are `found`."""
    rows = []
    for world in WORLDS:
        for settings in (2, 4, 8):
            for seeds in (3, 5):
                mean = {effect: intervals(world, np.full(settings, effect), seeds, trials) for effect in (0.0, 0.1, 0.2, 0.4)}
                one = intervals(world, np.r_[0.0, np.full(settings - 1, 0.4)], seeds, trials)
                for method in ("t, mean", "t, every", "bootstrap"):
                    low, high = (one if method == "t, every" else mean[0.0])[method].T
                    rows.append({"world": world, "settings": settings, "seeds": seeds, "method": method,
                                 "supported in error": (low > 0).mean(), "refuted in error": (high < 0).mean(),
                                 **{f"found, {100 * effect:g} points": (mean[effect][method][:, 0] > 0).mean()
                                    for effect in (0.1, 0.2, 0.4)}})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args()
    table = simulate(asked.trials)
    table.round(4).to_json(asked.out / "verdicts.json", orient="records", indent=1)
    percent = table.assign(**{name: (100 * table[name]).map("{:.1f}".format) for name in table.columns[4:]})
    print(percent.to_markdown(index=False))
