"""Adversarial unlearning by implicit hypergradients (I-BAU, Zeng et al., ICLR 2022); ims SPEC 7, fst SPEC 7.

    min over θ of  E(δ*(θ), θ)      with  δ*(θ) = argmin over δ of  I(δ, θ) = −CE(f_θ(x + δ), y) + 0.001 · ‖δ‖²

One perturbation δ serves all images. E is the cross-entropy of a batch in which a share of the images carries δ. δ*
depends on θ, which the hypergradient takes into account: with Φ(δ, θ) = δ − 0.1 · ∂I/∂δ, whose fixed point is δ*,

    dE/dθ = ∂E/∂θ + (∂Φ/∂θ)ᵀ v,      v = (1 − ∂Φ/∂δ)⁻ᵀ ∂E/∂δ  ≈  Σ_{k<K} ((∂Φ/∂δ)ᵀ)^k ∂E/∂δ

δ is in units of the normalised image and is never clipped, as released; BatchNorm is in eval mode.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.images.defences.base import defence
from cupel.images.defences.passes import batches
from cupel.rng import torch_rng


def hypergradient(mapping: Callable[[Tensor], Tensor], outer: Callable[[Tensor], Tensor], delta: Tensor,
                  parameters: Sequence[Tensor], iterations: int) -> tuple[Tensor, list[Tensor]]:
    """dE/dθ by `iterations` fixed-point steps for v.

    Args:
        mapping: Φ(·, θ); it must depend on `parameters` through the graph.
        outer: E(·, θ).
        delta: where both are taken, any shape.
        parameters: θ.
        iterations: K; 0 leaves the direct gradient alone.

    Returns:
        E and one gradient for each of `parameters`.
    """
    delta = delta.detach().requires_grad_()
    value = outer(delta)
    by_delta, *direct = torch.autograd.grad(value, [delta, *parameters], materialize_grads=True, allow_unused=True)
    mapped = mapping(delta)
    v = torch.zeros_like(delta)
    for _ in range(iterations):
        v = torch.autograd.grad(mapped, delta, v, retain_graph=True)[0] + by_delta
    implicit = torch.autograd.grad(mapped, parameters, v, materialize_grads=True, allow_unused=True)
    return value.detach(), [d + i for d, i in zip(direct, implicit, strict=True)]


@defence("i_bau")
def i_bau(victim, budget, rng, *, rounds=5, iterations=5, lr=1e-4, delta_lr=10.0, penalty=0.001, inner_step=0.1,
          portion=0.01, at_least_one=True, batch_size=256):
    """Unlearn a universal perturbation.

    Args:
        rounds: times that δ is found anew, by one pass of SGD over the data, before all batches are unlearned.
        iterations: K.
        lr: of Adam (AMSGrad, as released) on the weights.
        delta_lr: of the SGD on δ, which makes the network leave its own predictions.
        penalty: of ‖δ‖².
        inner_step: in Φ.
        portion: share of a batch that carries δ.
        at_least_one: at least one image does; False is as released: int(portion·B) is 0 below 100 images, and the
            defence is then plain fine-tuning.
        batch_size: B.
    """
    model = budget.copy_of(victim).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr, amsgrad=True)
    std, seed = model.normalize.std, int(rng.integers(2**62))
    fixed = list(batches(budget, batch_size, seed, 0))
    first, first_labels = fixed[0]

    def attack_loss(delta, x, y):
        return -F.cross_entropy(model(x + delta * std), y) + penalty * delta.square().sum()

    def mapping(delta):
        (slope,) = torch.autograd.grad(attack_loss(delta, first, first_labels), delta, create_graph=True)
        return delta - inner_step * slope

    history, delta, total = [], torch.zeros_like(first[:1]), torch.zeros((), dtype=torch.float64)
    work = budget.resume(model=model, optimizer=optimizer, delta=delta, total=total, history=history)
    for number in work.each(range(rounds), "rounds"):
        started = time.perf_counter()
        for x, _ in work.each(batches(budget, batch_size, seed, 1 + number), f"perturb {number}"):
            with torch.no_grad():
                own = model(x).argmax(1)
            probe = delta.clone().requires_grad_()
            (slope,) = torch.autograd.grad(attack_loss(probe, x, own), probe)
            delta -= delta_lr * slope
        draw = torch_rng(seed, "carriers", number)
        orders = [torch.randperm(len(y), generator=draw) for _, y in fixed]
        for (x, y), order in work.each(zip(fixed, orders, strict=True), f"unlearn {number}"):
            carriers = torch.zeros(len(y), 1, 1, 1, device=x.device)
            carriers[order[: max(int(portion * len(y)), int(at_least_one))]] = 1

            def outer(d, x=x, y=y, carriers=carriers):
                return F.cross_entropy(model(x + carriers * d * std), y)

            loss, gradients = hypergradient(mapping, outer, delta, parameters, iterations)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            total += loss.item() * len(y)
        history.append({"epoch": number + 1, "loss": total.item() / len(budget), "delta_norm": delta.norm().item(),
                        "seconds": time.perf_counter() - started})
        delta.zero_()
        total.zero_()
    model.zero_grad(set_to_none=True)
    return model, history
