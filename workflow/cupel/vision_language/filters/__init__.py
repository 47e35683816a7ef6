"""Ways to flag samples of a training set: BYE and what it is compared with (bye SPEC 7).

`decide(name, evidence, **settings)` runs one by its registered name.
"""

from cupel.vision_language.filters.base import MEASURES, Decision, Evidence, Mixture, hazards, matrix, mixture, sample_filter

__all__ = ["MEASURES", "Decision", "Evidence", "Mixture", "decide", "hazards", "matrix", "mixture", "sample_filter"]


def decide(name: str, evidence: Evidence, **given) -> Decision:
    """What the filter `name` flags.

    Raises:
        ValueError: an unknown filter, or a setting that it does not have.
    """
    return sample_filter.find(name)(evidence, **sample_filter.settings(name, given))
