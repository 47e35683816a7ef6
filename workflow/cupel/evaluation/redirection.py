"""Where triggered images go that no longer hit the target: back to their class, or to one other, which ASR does not see."""

from collections.abc import Mapping

import numpy as np

from cupel.evaluation.metrics import Rate


def redirected(counts: Mapping) -> dict[str, float]:
    """The largest share of triggered test images that are taken for one class which is neither theirs nor the target (own).

    A network without a trigger's effect makes its mistakes in many directions, so that the share is a few percent; where a
    defence only turned the trigger to another class, it is large, whatever the ASR.

    Args:
        counts: matrices [K, K], rows true and columns predicted classes, as records of cells keep them; `triggered` holds test
            images of all classes but the target.

    Returns:
        Flat entries of the rate; none where there is no trigger, or not one target alone.
    """
    triggered = np.array(counts.get("triggered", np.zeros((0, 0))), int)
    target = np.flatnonzero(triggered.sum(1) == 0)
    if len(target) != 1:
        return {}
    astray = triggered - np.diag(np.diag(triggered))
    astray[:, target] = 0
    return Rate(int(astray.sum(0).max()), int(triggered.sum())).record("redirected")
