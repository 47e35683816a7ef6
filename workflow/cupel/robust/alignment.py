"""Perceptual alignment: what a network looks at (proper_interpretability SPEC 8, E12).

The paper shows inputs that maximise neurons, but its repository has no code for them; the procedure is ours:

    x ← clip( x + η ∇ h_d(x) / ‖∇ h_d(x)‖₂ ),    h_d(x) = mean_ij A_dij(x),  from a test image, no ball around it

Where features mean something to people, so do the images; else they are patterns of noise.
"""

from torch import Tensor

from cupel.robust.models import GapClassifier
from cupel.training.adversarial import descend


def maximise(model: GapClassifier, start: Tensor, neurons: Tensor, *, steps: int = 100, step_size: float = 0.5) -> Tensor:
    """Images, from `start` float [B, C, H, W] in [0, 1], that make neurons of the penultimate layer large: `neurons` int64 [B].

    `step_size` is η, in the l2 norm of an image.
    """
    def step(x: Tensor, gradient: Tensor, _: int) -> Tensor:
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        return (x - step_size * gradient / length).clamp(0, 1)

    return descend(start, lambda x: -model.features(x).gather(1, neurons[:, None]).sum(), step, steps=steps)
