"""Shared Adversarial Unlearning (SAU, Wei et al., NeurIPS 2023); ims SPEC 7.

Adversarial examples that fool the network f and the victim f₀ alike, with the same wrong label, behave like poisoned
images. Inner problem, by signed steps in the L∞ ball, starting at +ε in every pixel:

    min over δ of   β₁ · L_adv + β₂ · L_share
    L_adv   = −1/(2B) · [ Σ CE(f(x+δ), y) over images f is not yet fooled on  +  the same for f₀ ]
    L_share = 1/B · Σ JS( f(x+δ), f₀(x+δ) ) over images that are not yet shared examples

Unlearning, with c the victim's label of x+δ and the sum over images on which the victim is fooled:

    min over θ of   λ₁ · CE(f(x), y) + λ₂ · CE(f(x+δ), y) + λ₃ · −1/B · Σ log(1 − p_c)

The released code writes the last term as the mean of two expressions that are equal but for their clamping, which
switches off images with p_c < 0.001; so does this one. Images are not augmented, x+δ is not clipped, BatchNorm is in
eval mode.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.images.defences.base import defence
from cupel.images.defences.passes import train
from cupel.training.adversarial import in_linf, perturb
from cupel.training.engine import descend


def inner_loss(logits: Tensor, reference: Tensor, own: Tensor, own_reference: Tensor, y: Tensor, *,
               beta_1: float, beta_2: float) -> Tensor:
    """β₁ · L_adv + β₂ · L_share.

    Args:
        logits, reference: float [B, K], of x+δ by f and f₀.
        own, own_reference: int64 [B], predictions on x by f and f₀.
        y: int64 [B], true labels.
    """
    label, label_reference = logits.argmax(1), reference.argmax(1)
    fooled, fooled_reference = label != own, label_reference != own_reference
    shared = fooled & fooled_reference & (label == label_reference)
    adversarial = (F.cross_entropy(logits, y, reduction="none") * ~fooled
                   + F.cross_entropy(reference, y, reduction="none") * ~fooled_reference)
    p, q = logits.softmax(1).clamp(min=1e-8), reference.softmax(1).clamp(min=1e-8)
    middle = ((p + q) / 2).log()
    divergence = (p * (p.log() - middle) + q * (q.log() - middle)).sum(1) / 2
    return beta_1 * -adversarial.mean() / 2 + beta_2 * (divergence * ~shared).mean()


def shared_risk(logits: Tensor, labels: Tensor, fooled: Tensor) -> Tensor:
    """−1/B · Σ log(1 − p_c) over `fooled`.

    Args:
        logits: float [B, K], of x+δ by f.
        labels: int64 [B], c.
        fooled: bool [B], the victim is fooled.
    """
    probabilities = logits.softmax(1)
    p = probabilities.gather(1, labels[:, None])[:, 0]
    others = probabilities.scatter(1, labels[:, None], 0.0).sum(1)
    risk = -(torch.log(1e-6 + others.clamp(max=0.999)) + torch.log(1 + 1e-6 - p.clamp(min=0.001))) / 2
    return (risk * fooled).mean()


def amsgrad(optimizer, closure):
    """An ordinary step, with Adam's AMSGrad variant on, as in the released settings."""
    optimizer.param_groups[0]["amsgrad"] = True
    return descend(optimizer, closure)


@defence("sau")
def sau(victim, budget, rng, *, rounds=100, lr=1e-4, eps=0.2, step_size=0.2, steps=5, beta_1=0.01, beta_2=1.0,
        lambda_1=1.0, lambda_2=0.0, lambda_3=1.0, batch_size=256):
    """Unlearn shared adversarial examples.

    Args:
        rounds: passes over the data; 20 on Tiny-ImageNet.
        lr: of Adam, constant.
        eps, step_size, steps: of the inner problem, in pixels.
        beta_1, beta_2: weights of L_adv and L_share.
        lambda_1, lambda_2, lambda_3: weights of the unlearning terms.
        batch_size: B.
    """
    model = budget.copy_of(victim)
    before = budget.copy_of(victim).eval()

    def objective(network, x, y):
        network.eval()
        with torch.no_grad():
            own, own_reference = network(x).argmax(1), before(x).argmax(1)
        delta = perturb(torch.full_like(x, eps),
                        lambda d: inner_loss(network(x + d).float(), before(x + d).float(), own, own_reference, y,
                                             beta_1=beta_1, beta_2=beta_2),
                        lambda d: in_linf(d, eps), steps=steps, step_size=step_size)
        with torch.no_grad():
            wrong = before(x + delta).argmax(1)
        logits, perturbed = network(torch.cat([x, x + delta])).float().chunk(2)
        fooled = (wrong != y) & (wrong != own_reference)
        loss = lambda_1 * F.cross_entropy(logits, y) + lambda_3 * shared_risk(perturbed, wrong, fooled)
        return loss + lambda_2 * F.cross_entropy(perturbed, y), logits

    recipe = budget.recipe(rounds, lr, batch_size=batch_size, optimizer="adam", weight_decay=0.0, schedule="constant",
                           crop=0, flip=False)
    return model, train(model, budget, recipe, rng, objective=objective, step=amsgrad, title="sau")
