"""Tuning on clean data: FT, LP, FE-tuning and FT-init (fst SPEC 2, the table of modes).

All share one optimiser: SGD with momentum and no weight decay, cosine to zero over the tuning epochs, train mode
throughout. FST itself, in fst.py, adds a penalty and a constraint to the same procedure.
"""

import copy
import math

import torch
from torch import nn

from cupel.images.defences.base import Budget, defence
from cupel.rng import torch_rng
from cupel.training.engine import fit


def reinitialise(linear: nn.Linear, generator: torch.Generator) -> None:
    """Draw weight and bias from U(−1/√d, 1/√d), d the input width (fst SPEC 2, step 2)."""
    bound = 1 / math.sqrt(linear.in_features)
    with torch.no_grad():
        for tensor in filter(lambda t: t is not None, (linear.weight, linear.bias)):
            fresh = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
            tensor.copy_(fresh)


def project(linear: nn.Linear, norm: torch.Tensor) -> None:
    """Scale the weight back to Frobenius norm `norm`; the bias is left alone (fst SPEC 2, step 5c)."""
    with torch.no_grad():
        linear.weight.mul_(norm / linear.weight.norm())


def tune(victim, budget: Budget, rng, *, fresh_head: bool, train_head: bool, train_extractor: bool, lr: float,
         epochs: int, batch_size: int, momentum: float, projected: bool, alpha: float = 0.0, heads: str = "last"):
    """The family of fst SPEC 2.

    Args:
        victim, budget, rng: see `cupel.images.defences.purify`.
        fresh_head: re-initialise the head first.
        train_head, train_extractor: which parameters are trained. Frozen parts stay in train mode, so running
            statistics of BatchNorm move all the same, as they do in the released code.
        projected: after each step scale the head's weight to its original norm.
        alpha: weight of the inner product ⟨W, W_ori⟩ in the loss.
        heads: `last` linear layer, or `all` linear layers of the classifier part (the IMS port).
    """
    model = copy.deepcopy(victim).to(budget.device)
    names = ["head", *(model.hidden_linears if heads == "all" else ())]
    linears = [model.get_submodule(name) for name in names]
    original = [linear.weight.detach().clone() for linear in linears]
    norms = [weight.norm() for weight in original]
    if fresh_head:
        generator = torch_rng(int(rng.integers(2**62)), "head")
        for linear in linears:
            reinitialise(linear, generator)
    head_parameters = {id(p) for linear in linears for p in linear.parameters()}
    trained = [p for p in model.parameters() if (train_head if id(p) in head_parameters else train_extractor)]

    def objective(network, x, y):
        logits = network(x)
        loss = nn.functional.cross_entropy(logits, y)
        if alpha:
            loss = loss + alpha * sum((linear.weight * w).sum() for linear, w in zip(linears, original, strict=True))
        return loss, logits

    def constrain(_):
        for linear, norm in zip(linears, norms, strict=True):
            project(linear, norm)

    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=0.0, schedule="cosine")
    history = fit(model, budget.images, budget.labels, recipe, seed=int(rng.integers(2**62)), device=budget.device,
                  objective=objective, after_step=constrain if projected else None, parameters=trained,
                  checkpoint=budget.checkpoint, title="tune")
    return model, history


@defence("ft")
def ft(victim, budget, rng, *, lr=0.01, epochs=10, batch_size=128, momentum=0.9, projected=False):
    """Vanilla fine-tuning of all weights. `projected`: the released FST script projects in this mode too."""
    return tune(victim, budget, rng, fresh_head=False, train_head=True, train_extractor=True, lr=lr, epochs=epochs,
                batch_size=batch_size, momentum=momentum, projected=projected)


@defence("lp")
def lp(victim, budget, rng, *, lr=0.01, epochs=10, batch_size=128, momentum=0.9, projected=False):
    """Linear probing: only the head is trained."""
    return tune(victim, budget, rng, fresh_head=False, train_head=True, train_extractor=False, lr=lr, epochs=epochs,
                batch_size=batch_size, momentum=momentum, projected=projected)


@defence("fe_tuning")
def fe_tuning(victim, budget, rng, *, lr=0.01, epochs=10, batch_size=128, momentum=0.9, projected=False):
    """The head is re-initialised and frozen; the extractor is trained."""
    return tune(victim, budget, rng, fresh_head=True, train_head=False, train_extractor=True, lr=lr, epochs=epochs,
                batch_size=batch_size, momentum=momentum, projected=projected)


@defence("ft_init")
def ft_init(victim, budget, rng, *, lr=0.01, epochs=10, batch_size=128, momentum=0.9, projected=False):
    """The head is re-initialised; everything is trained."""
    return tune(victim, budget, rng, fresh_head=True, train_head=True, train_extractor=True, lr=lr, epochs=epochs,
                batch_size=batch_size, momentum=momentum, projected=projected)
