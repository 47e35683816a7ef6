"""Feature Shift Tuning (Min et al., NeurIPS 2023), Algorithm 1; fst SPEC 2.

    min over θ, W, b   CE(W φ_θ(x) + b, y) + α ⟨W, W_ori⟩     subject to ‖W‖_F = ‖W_ori‖_F

The head W is re-initialised and pushed away from the victim's head W_ori, so that the features have to shift; the
constraint keeps the linear term bounded. The inner product is a plain sum over all entries. Its mean over an epoch, times α,
is the column `penalty` of the history, beside the loss that it is part of.
"""

from cupel.images.defences.base import defence
from cupel.images.defences.tuning import tune


@defence("fst")
def fst(victim, budget, rng, *, alpha=0.2, lr=0.01, epochs=10, batch_size=128, momentum=0.9, projected=True,
        heads="last"):
    """Feature shift tuning.

    Args:
        alpha: weight of the inner product; 0.2 on CIFAR-10, 0.1 on GTSRB, 0.001 on CIFAR-100 and Tiny-ImageNet.
        projected: keep the constraint; without it the penalty is unbounded below (ablation).
        heads: `last` as released; `all` linear layers of the classifier, as in the IMS port for VGG and MobileNet.
    """
    return tune(victim, budget, rng, lr=lr, epochs=epochs, batch_size=batch_size, momentum=momentum, projected=projected,
                fresh_head=True, alpha=alpha, heads=heads)
