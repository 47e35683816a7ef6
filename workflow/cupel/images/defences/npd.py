"""Neural Polarizer (NPD, Zhu et al., NeurIPS 2023); ims SPEC 7.

A small layer, BN(1×1 convolution), is put in front of one late convolution and is all that is trained; the network
around it is frozen, in eval mode. For x̃ = clip(x + δ), an example that drives the network towards the runner-up class t
of x, with p = softmax f(x̃) and c = argmax f(x):

    min   CE(f(x), y) + λ₂ · CE(f(x̃), c) + λ₃ · −log(1 − p_w) + λ₄ · −log(1 − p_t)

w is the strongest wrong class of x̃. δ comes from signed steps in the L2 ball and stops once 60 % of the batch reach t.
Training is preceded by a warm-up on CE(f(x), y) alone, in which the statistics of the new BatchNorm are found; after it
they stay.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.images.defences.base import defence
from cupel.images.defences.passes import stage, train
from cupel.images.models.attachments import attach
from cupel.training.adversarial import in_l2, perturb

#: convolution behind the polarizer: the released places (ims SPEC 7); for resnet18 the one that corresponds
PLACES = {
    "preactresnet18": "extractor.layer4.1.conv1",
    "resnet18": "extractor.layer4.1.conv1",
    "vgg19_bn": "extractor.features.49",
    "efficientnet_b3": "extractor.features.8.0",
    "mobilenet_v3_large": "extractor.features.16.0",
}


def without(logits: Tensor, labels: Tensor) -> Tensor:
    """The strongest class other than `labels`, int64 [B]."""
    return logits.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)


def not_this(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of −log(1 − p) with p the probability of `labels`; 1.0001 in place of 1 keeps it finite, as released."""
    return -torch.log(1.0001 - logits.softmax(1).gather(1, labels[:, None])).mean()


@defence("npd")
def npd(victim, budget, rng, *, place="", warm_epochs=5, warm_lr=1e-4, epochs=50, lr=0.01, batch_size=128,
        momentum=0.9, weight_decay=5e-4, bound=3.0, steps=2, step_size=0.1, signed=True, enough=0.6, lambda_1=1.0,
        lambda_2=0.4, lambda_3=0.4, lambda_4=0.4):
    """Insert and train a polarizer.

    Args:
        place: the convolution to put it in front of; empty: the released choice for this network (`PLACES`).
        warm_epochs, warm_lr: of the warm-up, by SGD without momentum.
        epochs, lr, batch_size, momentum, weight_decay: of the training, constant learning rate.
        bound: of ‖δ‖₂ for each image, in pixels; 5 on GTSRB.
        steps, step_size: of the inner problem.
        signed: step along the sign of the gradient; on Tiny-ImageNet the released code steps along the gradient.
        enough: share of the batch that reaches t at which the inner problem stops.
        lambda_1, lambda_2, lambda_3, lambda_4: weights of the four terms; the last three are 0.5 on GTSRB.

    Raises:
        ValueError: no `place` is given and none is known for this network, or there is no convolution.
    """
    place = place or PLACES.get(victim.spec["name"], "")
    if not place:
        raise ValueError(f"npd knows no place for a polarizer in {victim.spec['name']!r}, only in {', '.join(PLACES)}: "
                         "set place to the name of a late convolution")
    host = dict(victim.named_modules()).get(place)
    if not isinstance(host, torch.nn.Conv2d):
        raise ValueError(f"npd needs a convolution, and the victim has none called {place!r}")
    model = budget.copy_of(victim)
    polarizer = attach(model, "polarizer", place, (host.in_channels,))

    def warm(network, x, y):
        network.eval()
        polarizer.train()
        logits = network(x)
        return lambda_1 * F.cross_entropy(logits, y), logits

    def objective(network, x, y):
        network.eval()
        logits = network(x).float()
        own, towards = logits.argmax(1), without(logits, y)

        def reached(delta):
            with torch.no_grad():
                return (network((x + delta).clamp(0, 1)).argmax(1) == towards).float().mean().item() > enough

        delta = perturb(torch.zeros_like(x), lambda d: F.cross_entropy(network((x + d).clamp(0, 1)).float(), towards),
                        lambda d: in_l2(d, bound), steps=steps, step_size=step_size, signed=signed, until=reached)
        adversarial = network((x + delta).clamp(0, 1)).float()
        loss = (lambda_1 * F.cross_entropy(logits, y) + lambda_2 * F.cross_entropy(adversarial, own)
                + lambda_3 * not_this(adversarial, without(adversarial, y)) + lambda_4 * not_this(adversarial, towards))
        return loss, logits

    budget.resume(model=model)
    constant = {"batch_size": batch_size, "schedule": "constant"}
    history = []
    for name, loss, recipe in (
            ("warm-up", warm, budget.recipe(warm_epochs, warm_lr, momentum=0.0, weight_decay=0.0, **constant)),
            ("polarize", objective, budget.recipe(epochs, lr, momentum=momentum, weight_decay=weight_decay, **constant))):
        history += stage(name, train(model, budget, recipe, rng, objective=loss, parameters=polarizer.parameters(),
                                     title=f"npd {name}"))
    return model, history
