"""Mitigation of MM-BD (Wang et al., IEEE S&P 2024): upper clamps of activations; ims SPEC 7.

    min over c of   MSE( f_c(x), f(x) ) + λ · Σ_l ‖c_l‖₂,      layer l of f_c gives  min(a, c_l), one bound per channel

A backdoor drives a few activations far above what clean images need; bounds that only just let clean images through
stop it. The network stays in eval mode and keeps its weights. λ grows by the factor α now and then as long as clean
accuracy has fallen by less than an allowance, and shrinks by α otherwise. All bounds of a layer start at its largest
activation on the clean images.

Clamped are the outputs of all BatchNorm2d layers: the released choice for PreActResNet18, whose activations are no
modules. For the other networks the released code clamps the activations behind instead, which is the same up to a
change of variable wherever an increasing activation follows a BatchNorm.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cupel.images.defences.base import defence
from cupel.images.defences.passes import batches, train, watched
from cupel.images.models.attachments import attach
from cupel.training.hook import Hook


def largest_activations(model: nn.Module, layers: dict[str, nn.Module], images) -> list[float]:
    """The largest output entry of each layer over batches of pixels, float [B, C, H, W]."""
    found = {name: [] for name in layers}
    with torch.no_grad(), watched(layers, lambda name, output: found[name].append(output.float().max())):
        for x in images:
            model(x)
    return [torch.stack(values).max().item() for values in found.values()]


class ClampPenalty(Hook):
    """λ · Σ_l ‖c_l‖₂ and the rule for λ.

    Args:
        bounds: the c_l.
        weight: λ at the start.
        factor: α.
        every: epochs between two changes; the first comes after epoch `every` + 1, as released.
        least_accuracy: of the training batches of an epoch, for λ to grow.
    """

    def __init__(self, bounds: list[torch.Tensor], weight: float, factor: float, every: int, least_accuracy: float):
        self.bounds, self.weight, self.factor = bounds, weight, factor
        self.every, self.least_accuracy = every, least_accuracy
        self.right = self.seen = 0

    def epoch(self, number: int) -> None:
        done = number - 1
        if done > 0 and done % self.every == 0:
            within = float(self.right) / self.seen > self.least_accuracy
            self.weight *= self.factor if within else 1 / self.factor
        self.right = self.seen = 0

    def loss(self, model, x, y, logits):
        self.right = self.right + (logits.detach().argmax(1) == y).sum()
        self.seen += len(y)
        return self.weight * sum(bound.norm() for bound in self.bounds)

    def state_dict(self) -> dict:
        return {"weight": self.weight, "right": float(self.right), "seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.weight, self.right, self.seen = state["weight"], state["right"], state["seen"]


@defence("mm_bd")
def mm_bd(victim, budget, rng, *, epochs=50, lr=1e-3, weight=0.5, factor=1.2, every=10, allowance=0.05,
          batch_size=256, hooks="kept"):
    """Clamp activations.

    Args:
        epochs, lr, batch_size: of Adam on the bounds. Adam lowers a bound by about lr per step, whatever λ is: with the
            released values and 1,000 images by 0.2 at most in all, which only bites where activations are that small.
        weight, factor, every: λ, α, and how often λ changes, in epochs.
        allowance: clean accuracy that may be lost, as a fraction.
        hooks: `kept`; or `removed`, as released: the code takes its clamps off before training them, so that the
            victim is returned.

    Raises:
        ValueError: the network has no BatchNorm2d.
    """
    model = budget.copy_of(victim).eval()
    if hooks == "removed":
        return model, [{"note": "hooks are removed before training, as released: the victim is unchanged"}]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if not layers:
        raise ValueError(f"mm_bd clamps the outputs of BatchNorm2d layers, and {victim.spec['name']!r} has none")
    before, seed = budget.copy_of(model), int(rng.integers(2**62))
    data = list(batches(budget, batch_size, seed, 0))
    starts = largest_activations(model, layers, (x for x, _ in data))
    bounds = [attach(model, "clamp", name, (layer.num_features, 1, 1)).bound for name, layer in layers.items()]
    with torch.no_grad():
        for bound, start in zip(bounds, starts, strict=True):
            bound.fill_(start)
        accuracy = sum((before(x).argmax(1) == y).sum().item() for x, y in data) / len(budget)

    def objective(network, x, y):
        network.eval()
        with torch.no_grad():
            wanted = before(x)
        logits = network(x)
        return F.mse_loss(logits.float(), wanted.float()), logits

    recipe = budget.recipe(epochs, lr, batch_size=batch_size, optimizer="adam", weight_decay=0.0, schedule="constant")
    penalty = ClampPenalty(bounds, weight, factor, every, accuracy - allowance)
    return model, train(model, budget, recipe, seed, objective=objective, hook=penalty, parameters=bounds, title="mm_bd")
