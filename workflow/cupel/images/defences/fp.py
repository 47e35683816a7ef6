"""Fine-Pruning (Liu et al., RAID 2018), as in BackdoorBench and the IMS authors' fork; ims SPEC 7.

The input features of the first linear layer of the classifier part are pruned (their columns of the weight zeroed) in
ascending order of their mean activation on clean data, a hundredth of them per step, while the accuracy on held-out
clean data stays near its start. Then all weights but the pruned ones are tuned.

The released code keeps one step too many, because its "last good" network is the same object as the one pruned further;
here the last good one is kept.
"""

import math

import torch

from cupel.images.defences.base import Budget, defence
from cupel.images.defences.masks import accuracy
from cupel.images.defences.passes import stage, train, watched
from cupel.training.engine import predict


def classifier_input(model) -> str:
    """Name of the first linear layer of the classifier part: the head, or the first of several linear layers."""
    return (*model.hidden_linears, "head")[0]


def mean_activations(model, name: str, budget: Budget) -> torch.Tensor:
    """Mean input [d] of linear layer `name` over the images of a budget, in eval mode and in float32, float64."""
    sums = []
    with watched({name: model.get_submodule(name)}, lambda _, features: sums.append(features.double().sum(0)), inputs=True):
        predict(model, budget.images, device=budget.device)
    return torch.stack(sums).sum(0) / len(budget)


@defence("fp")
def fp(victim, budget, rng, *, tolerance=0.1, step=0.01, validation=0.1, epochs=100, lr=0.01, momentum=0.9,
       weight_decay=5e-4, batch_size=256):
    """Fine-pruning.

    Args:
        tolerance: pruning goes on while |accuracy − start| / start on the validation part is below it.
        step: share of the features pruned per step, rounded up.
        validation: share of each class kept apart; it is neither ranked nor tuned on.
        epochs, lr, momentum, weight_decay, batch_size: of tuning by SGD, cosine to zero.
    """
    model = budget.copy_of(victim).eval()
    training, held = budget.split(validation, rng)
    name = classifier_input(model)
    weight = model.get_submodule(name).weight
    original = weight.detach().clone()
    order = mean_activations(model, name, training).argsort(stable=True)
    keep = torch.ones_like(original[0])
    initial, history = accuracy(model, held), []
    for count in range(0, len(order), math.ceil(len(order) * step)):
        candidate = torch.ones_like(keep)
        candidate[order[:count]] = 0
        with torch.no_grad():
            weight.copy_(original * candidate)
        found = accuracy(model, held)
        accepted = initial > 0 and abs(found - initial) / initial < tolerance
        history.append({"stage": "prune", "pruned": count / len(order), "acc": found, "accepted": accepted})
        if not accepted:
            break
        keep = candidate

    def mask(_):
        with torch.no_grad():
            weight.mul_(keep)

    with torch.no_grad():
        weight.copy_(original * keep)
    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=weight_decay)
    return model, history + stage("tune", train(model, training, recipe, rng, after_step=mask, title="fp tune"))
