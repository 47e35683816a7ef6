"""BTI-DBF(U): trigger inversion by decoupling benign features, with unlearning (Xu et al., ICLR 2024); ims SPEC 7.

With φ the penultimate features [B, d], W the head, and G a U-Net on images:

    1. benign features   min over m ∈ (0, 1)^d of   CE(W(m ⊙ φ(x)), y) − CE(W((1 − m) ⊙ φ(x)), y)
    2. generator         max over G of   MSE((1 − m) ⊙ φ(x), (1 − m) ⊙ φ(G(x)))       with the image and m ⊙ φ kept
    3. unlearning        min over θ of   CE(f(x'), y) + MSE(φ(x), φ(x')),     x' = x with 10 % of the images through G

The three are repeated. G is first trained to reproduce the image. From the second round on it is also drawn to the
class that its images fell into most after the first.

The released script imports helper files that its repository lacks, so the following is our reading: φ is the
penultimate vector rather than a feature map, and the form of the U-Net. Also ours: every stage starts a fresh Adam, the
image loss of the generator's pre-training is a cross-entropy of logits (released: of probabilities put in as logits),
and no noise is added to images when the target class is read off. Image distances are measured on normalised images,
as released.
"""

import copy
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.images.defences.base import defence
from cupel.images.defences.passes import batches, stage, train
from cupel.rng import derive, seeded


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net from pixels to pixels, float [B, C, H, W] in and out, without clipping; any H, W ≥ 2^blocks.

    Args:
        normalize: the victim's `cupel.images.models.Normalize`; the network works on normalised images.
        width: channels of the first level; they double with each of the `blocks` levels below.
    """

    def __init__(self, normalize: nn.Module, width: int, blocks: int = 4) -> None:
        super().__init__()
        self.normalize, channels = normalize, len(normalize.mean)
        sizes = [width * 2**level for level in range(blocks + 1)]
        self.enter = _double(channels, width)
        self.down = nn.ModuleList(_double(a, b) for a, b in itertools.pairwise(sizes))
        self.up = nn.ModuleList(_double(a + b, a) for a, b in itertools.pairwise(sizes))
        self.leave = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.enter(self.normalize(x))]
        for block in self.down:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        out = levels.pop()
        for block in reversed(self.up):
            skip = levels.pop()
            out = block(torch.cat([skip, F.interpolate(out, size=skip.shape[2:], mode="bilinear")], dim=1))
        return self.leave(out) * self.normalize.std + self.normalize.mean


class FeatureMask(nn.Module):
    """m = (tanh(u) + 1)/2 for d features."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.u = nn.Parameter(start)

    def forward(self) -> Tensor:
        return (self.u.tanh() + 1) / 2


def mask_loss(head: Callable[[Tensor], Tensor], features: Tensor, mask: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of step 1 and the logits with the benign features, for features [B, d], mask [d], labels [B]."""
    logits = head(mask * features)
    return F.cross_entropy(logits, y) - F.cross_entropy(head((1 - mask) * features), y), logits


def generator_loss(clean: Tensor, generated: Tensor, mask: Tensor, image_distance: Tensor, *,
                   image_bound: float, feature_bound: float) -> Tensor:
    """The loss of step 2.

    Args:
        clean, generated: features [B, d] of x and G(x).
        mask: [d].
        image_distance: MSE(x, G(x)).
        image_bound, feature_bound: beyond either, only the image distance counts.
    """
    benign = F.mse_loss(mask * clean, mask * generated)
    other = F.mse_loss((1 - mask) * clean, (1 - mask) * generated)
    outside = (image_distance > image_bound) | (benign > feature_bound)
    return torch.where(outside, image_distance, 0.01 * benign - other)


@defence("bti_dbf")
def bti_dbf(victim, budget, rng, *, rounds=5, pretrain_epochs=50, mask_epochs=20, generator_epochs=30,
            unlearn_epochs=30, mask_lr=0.01, generator_lr=1e-3, lr=1e-4, image_bound=0.3, feature_bound=3.0,
            share=0.1, generator_width=32, batch_size=128):
    """Invert by decoupling, then unlearn.

    Args:
        rounds: of steps 1 to 3.
        pretrain_epochs, mask_epochs, generator_epochs, unlearn_epochs: passes over the data in each step.
        mask_lr, generator_lr, lr: of Adam on m, G and the network.
        image_bound, feature_bound: of the mean squared changes of image and benign features in step 2.
        share: of a batch that goes through G in step 3: int(share·B + 1) images.
        generator_width: channels of the U-Net's first level.
        batch_size: B.
    """
    # weights ask for gradients in the unlearning only, where `fit` turns them on
    model = budget.copy_of(victim).eval().requires_grad_(False)
    seed, history = int(rng.integers(2**62)), []
    with seeded(derive(seed, "generator")):
        generator = UNet(copy.deepcopy(model.normalize).cpu(), generator_width)
        masks = nn.ModuleList(FeatureMask(start) for start in torch.randn(rounds, model.head.in_features))
    found = {}
    budget.resume(model=model, generator=generator, masks=masks, found=found)

    def run(name, trained, epochs, rate, objective):
        recipe = budget.recipe(epochs, rate, batch_size=batch_size, optimizer="adam", weight_decay=0.0,
                               schedule="constant")
        history.extend(stage(name, train(trained, budget, recipe, rng, objective=objective, title=f"bti_dbf {name}")))

    def image_mse(x, generated):
        return F.mse_loss(model.normalize(generated.float()), model.normalize(x))

    def reproduce(generator, x, y):
        model.eval()
        generated = generator(x)
        with torch.no_grad():
            wanted = model.features(x)
            target = model.head(wanted).float().softmax(1)
        features = model.features(generated)
        logits = model.head(features)
        distance = image_mse(x, generated)
        loss = F.cross_entropy(logits.float(), target) + F.mse_loss(features.float(), wanted.float())
        return loss + torch.where(distance > 0.1, 100.0, 0.01) * distance, logits

    run("reproduce", generator, pretrain_epochs, generator_lr, reproduce)
    for feature_mask in masks:
        # in train mode, as released, but on a copy: the statistics of the network must not move here
        inverted = budget.copy_of(model).train()

        def decouple(module, x, y, inverted=inverted):
            with torch.no_grad():
                features = inverted.features(x)
            return mask_loss(inverted.head, features, module(), y)

        run("decouple", feature_mask, mask_epochs, mask_lr, decouple)
        mask, detected = feature_mask().detach(), found.get("class")

        def invert(generator, x, y, mask=mask, detected=detected):
            model.eval()
            generated = generator(x)
            with torch.no_grad():
                clean = model.features(x).float()
            features = model.features(generated).float()
            logits = model.head(features).float()
            loss = generator_loss(clean, features, mask, image_mse(x, generated),
                                  image_bound=image_bound, feature_bound=feature_bound)
            return loss if detected is None else loss + F.cross_entropy(logits, torch.full_like(y, detected)), logits

        run("invert", generator, generator_epochs, generator_lr, invert)
        if not found:
            with torch.no_grad():
                predicted = torch.cat([model(generator(x)).argmax(1) for x, _ in batches(budget, batch_size, seed, 0)])
            found["class"] = predicted.bincount(minlength=budget.classes).argmax().item()

        def unlearn(network, x, y):
            # batches are shuffled, so the first images are random ones
            count = int(share * len(y) + 1)
            with torch.no_grad():
                mixed = torch.cat([generator(x[:count]).to(x.dtype), x[count:]])
            features = network.features(mixed)
            logits = network.head(features)
            return F.cross_entropy(logits, y) + F.mse_loss(features.float(), network.features(x).float()), logits

        run("unlearn", model, unlearn_epochs, lr, unlearn)
    model.requires_grad_(True)
    return model, [{**row, "detected_class": found.get("class")} for row in history]
