"""Intervals of rates."""

import numpy as np
from scipy.special import ndtri  # scipy.stats takes half a second to import, in every job


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = ndtri(0.5 + level / 2), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))
