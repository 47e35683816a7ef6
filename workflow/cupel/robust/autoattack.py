"""Our addition: parameter-free attacks of `adversarial-robustness-toolbox` (ART), since plain PGD overstates robustness.

The paper's PGD starts at the image and has a fixed step. Run here, in this order, each on the images that the ones before
left standing:

    apgd_ce    AutoPGD on the cross-entropy
    apgd_dlr   AutoPGD on the difference of logits ratio, which a rescaling of the logits does not change
    square     random search, without gradients

These are the attacks of ART's AutoAttack but for DeepFool, an attack in l2 whose results outside of the l_inf ball ART throws
away. It is not the standard AutoAttack of Croce and Hein (2020): that has targeted APGD and FAB for the second and third, and
its AutoPGD gives back the best iterate where ART's (1.20) gives back the last. Robust accuracy is an upper bound either way.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cupel.registry import one_of
from cupel.rng import derive
from cupel.robust.attacks import box

ATTACKS = ("apgd_ce", "apgd_dlr", "square")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """ART draws from NumPy's global generator, which is left as it was."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


def attack(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, seed: int, attacks: Sequence[str] = ATTACKS,
           iterations: int = 100, restarts: int = 1, queries: int = 1000, batch_size: int = 100) -> dict[str, Tensor]:
    """Worst points x' in the l_inf ball of ε by attack, each after those before it: an image that one got is that one's.

    Args:
        model: pixels to logits.
        x, y: float [B, C, H, W] in [0, 1], int64 [B].
        eps: ε > 0; the first step of AutoPGD is 2ε, as its authors say.
        attacks: which of `ATTACKS`, in this order.
        iterations, restarts: of AutoPGD (ART: 100 and 5).
        queries: iterations of the random search (ART: 5000).

    Raises:
        ValueError: an unknown attack; ART does so for an ε that is not positive.
    """
    from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
    from art.estimators.classification import PyTorchClassifier

    for name in attacks:
        one_of("attack", name, ATTACKS)
    logging.getLogger("art").setLevel(logging.ERROR)
    estimator = PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), model(x[:1]).shape[1],
                                  clip_values=(0.0, 1.0), device_type="gpu" if x.is_cuda else "cpu")
    estimator.set_batchnorm(False)
    pgd = {"estimator": estimator, "eps": eps, "eps_step": 2 * eps, "max_iter": iterations, "nb_random_init": restarts,
           "batch_size": batch_size, "verbose": False}
    known = {
        "apgd_ce": lambda: AutoProjectedGradientDescent(**pgd, loss_type="cross_entropy"),
        "apgd_dlr": lambda: AutoProjectedGradientDescent(**pgd, loss_type="difference_logits_ratio"),
        "square": lambda: SquareAttack(estimator, eps=eps, max_iter=queries, batch_size=batch_size, verbose=False),
    }
    found, worst, project = {}, x, box(x, eps)
    for name in attacks:
        with torch.no_grad():
            standing = model(worst).argmax(1) == y
        if standing.any():
            with _seeded(derive(seed, "autoattack", name)):
                made = known[name]().generate(x[standing].detach().cpu().numpy(), y[standing].cpu().numpy())
            changed = worst.clone()
            changed[standing] = torch.from_numpy(made).to(x)
            worst = project(changed)
        found[name] = worst
    return found
