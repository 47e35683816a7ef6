"""Fine-tuning as BackdoorBench and IMS do it (ims SPEC 7, backdoorbench SPEC 7): long, and with weight decay.

It differs from `ft` of fst SPEC 2 (defences/tuning.py) in length, batch size and weight decay only.
"""

import copy

from cupel.images.defences.base import defence
from cupel.training.engine import fit


@defence("ft_long")
def ft_long(victim, budget, rng, *, lr=0.01, epochs=100, batch_size=256, momentum=0.9, weight_decay=5e-4):
    """All weights are trained on the clean images by SGD, with a cosine to zero over the epochs."""
    model = copy.deepcopy(victim).to(budget.device)
    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=weight_decay)
    return model, fit(model, budget.images, budget.labels, recipe, seed=int(rng.integers(2**62)), device=budget.device,
                      checkpoint=budget.checkpoint, title="ft_long")
