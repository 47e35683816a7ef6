"""Tuning on clean data: FT, LP, FE-tuning and FT-init (fst SPEC 2, the table of modes), and FT as IMS does it.

All share one optimiser: SGD with momentum, cosine to zero over the tuning epochs, train mode throughout, without weight
decay but in the last. FST itself, in fst.py, adds a penalty and a constraint to the same procedure.
"""

import math
import sys

import torch
from torch import nn

from cupel.images.defences.base import Budget, defence
from cupel.images.defences.passes import train
from cupel.rng import torch_rng
from cupel.training.hook import Hook


def reinitialise(linear: nn.Linear, generator: torch.Generator) -> None:
    """Draw weight and bias from U(−1/√d, 1/√d), d the input width (fst SPEC 2, step 2)."""
    bound = 1 / math.sqrt(linear.in_features)
    with torch.no_grad():
        for tensor in linear.parameters():
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))


def project(linear: nn.Linear, norm: torch.Tensor) -> None:
    """Scale the weight back to Frobenius norm `norm`; the bias is left alone (fst SPEC 2, step 5c)."""
    with torch.no_grad():
        linear.weight.mul_(norm / linear.weight.norm())


class Penalty(Hook):
    """α Σ ⟨W, W_ori⟩ over `linears`, added to the loss; `sums` float64 [epochs] adds it up over the samples of each epoch.

    It says how far the penalty can go: down to −α Σ ‖W_ori‖² as long as the constraint holds. Where that dwarfs the
    cross-entropy, the tuning hardly looks at the images: on a demo victim a reach of 7 times its start already cost most of
    the accuracy, one of 3 times some.
    """

    def __init__(self, alpha: float, linears: list[nn.Linear], original: list[torch.Tensor], epochs: int):
        self.alpha, self.linears, self.original, self.said = alpha, linears, original, False
        self.sums = torch.zeros(epochs, dtype=torch.float64, device=original[0].device)

    def epoch(self, number):
        self.number = number

    def loss(self, model, x, y, logits):
        if not self.said:
            self.said = True
            reach = self.alpha * sum(float(w.square().sum()) for w in self.original)
            entropy = float(nn.functional.cross_entropy(logits.detach(), y))
            print(f"fst: the penalty can fall to -{reach:.3g}, the cross-entropy is {entropy:.3g} at the start"
                  + (": a fifth or less, so the penalty will decide the tuning" if reach > 5 * entropy else ""),
                  file=sys.stderr, flush=True)
        value = self.alpha * sum((linear.weight * w).sum() for linear, w in zip(self.linears, self.original, strict=True))
        self.sums[self.number] += value.detach() * len(y)
        return value

    def state_dict(self):
        return {"sums": self.sums}

    def load_state_dict(self, state):
        self.sums = state["sums"]


def tune(victim, budget: Budget, rng, *, lr: float, epochs: int, batch_size: int, momentum: float, projected: bool,
         fresh_head: bool = False, train_head: bool = True, train_extractor: bool = True, alpha: float = 0.0,
         heads: str = "last"):
    """The family of fst SPEC 2.

    Args:
        fresh_head: re-initialise the head first.
        train_head, train_extractor: which parameters are trained. Frozen parts stay in train mode, so running
            statistics of BatchNorm move all the same, as they do in the released code.
        projected: after each step scale the head's weight to its original norm.
        alpha: weight of the inner product ⟨W, W_ori⟩ in the loss; not 0, it gives the history a column `penalty`, which
            is part of `loss`.
        heads: `last` linear layer, or `all` linear layers of the classifier part (the IMS port).
    """
    model = budget.copy_of(victim)
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

    def constrain(_):
        for linear, norm in zip(linears, norms, strict=True):
            project(linear, norm)

    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=0.0)
    penalty = Penalty(alpha, linears, original, epochs) if alpha else None
    history = train(model, budget, recipe, rng, after_step=constrain if projected else None, parameters=trained, hook=penalty,
                    title="tune")
    if penalty:
        for row, total in zip(history, penalty.sums.tolist(), strict=True):
            row["penalty"] = total / len(budget)
    return model, history


@defence("ft")
def ft(victim, budget, rng, *, lr=0.01, epochs=10, batch_size=128, momentum=0.9, projected=False):
    """Vanilla fine-tuning of all weights. `projected`: the released FST script projects in this mode too."""
    return tune(victim, budget, rng, lr=lr, epochs=epochs, batch_size=batch_size, momentum=momentum, projected=projected)


@defence("lp")
def lp(victim, budget, rng, *, lr=0.01, epochs=10, batch_size=128, momentum=0.9, projected=False):
    """Linear probing: only the head is trained."""
    return tune(victim, budget, rng, lr=lr, epochs=epochs, batch_size=batch_size, momentum=momentum, projected=projected,
                train_extractor=False)


@defence("fe_tuning")
def fe_tuning(victim, budget, rng, *, lr=0.01, epochs=10, batch_size=128, momentum=0.9, projected=False):
    """The head is re-initialised and frozen; the extractor is trained."""
    return tune(victim, budget, rng, lr=lr, epochs=epochs, batch_size=batch_size, momentum=momentum, projected=projected,
                fresh_head=True, train_head=False)


@defence("ft_init")
def ft_init(victim, budget, rng, *, lr=0.01, epochs=10, batch_size=128, momentum=0.9, projected=False):
    """The head is re-initialised; everything is trained."""
    return tune(victim, budget, rng, lr=lr, epochs=epochs, batch_size=batch_size, momentum=momentum, projected=projected,
                fresh_head=True)


@defence("ft_long")
def ft_long(victim, budget, rng, *, lr=0.01, epochs=100, batch_size=256, momentum=0.9, weight_decay=5e-4):
    """FT as in BackdoorBench and IMS (ims SPEC 7, backdoorbench SPEC 7): long, and with weight decay."""
    model = budget.copy_of(victim)
    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=weight_decay)
    return model, train(model, budget, recipe, rng, title="ft_long")
