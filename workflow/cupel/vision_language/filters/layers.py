"""BYE with its layers chosen in other ways: a layer test that fails says more of the test than of the signal."""

import numpy as np

from cupel.vision_language.filters.base import Decision, Evidence, mixture, sample_filter


@sample_filter("best_layer")
def best_layer(evidence: Evidence, *, measure: str = "shannon") -> Decision:
    """The low component of the one layer that two normals describe best, against one normal (`Mixture.gain`); no threshold."""
    evidence = evidence.by(measure)
    best = int(np.argmax([layer.gain for layer in evidence.layers]))
    return Decision(evidence.layers[best].low, evidence.values[:, best])


@sample_filter("first_layers")
def first_layers(evidence: Evidence, *, count: int = 2, measure: str = "tsallis") -> Decision:
    """The low component of the mixture on the mean over the first `count` layers.

    Tsallis entropy and the first layers are what EntropyScan (arXiv 2605.15711) tells poisoned models by; it judges no samples.
    How many layers, and the order of the entropy, are chosen here.
    """
    score = evidence.by(measure).values[:, :count].mean(1)
    return Decision(mixture(score).low, score)
