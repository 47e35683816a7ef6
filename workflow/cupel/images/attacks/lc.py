"""LC, label-consistent (Turner et al., 2019): target-class images made hard, so that the corners carry the label.

    training:  x' = clip(P_eps(x) + p)     x of the target class, label kept;  P_eps(x) ascends the cross-entropy of a
                                           network over |x' − x| ≤ eps by signed gradient steps
    test:      x' = clip(x + p)

p is ±255·amplitude on a 3×3 block in each corner (fst SPEC 3, backdoorbench SPEC 4). The papers take an adversarially
trained ResNet-18 for P, whose weights were not released; here it is the clean network given, or a fresh one of its
architecture that is adversarially trained first (`robust_epochs`), whose perturbations look like another class.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.images.attacks._preparation import frozen, share
from cupel.images.attacks.base import Attack, attack, quantise
from cupel.images.datasets import Dataset
from cupel.images.models import build
from cupel.rng import derive
from cupel.training.augment import to_pixels
from cupel.training.engine import Recipe, fit, upload
from cupel.training.progress import Progress

#: signs in the left corners, top and bottom alike; the right corners have its mirror image
LEFT_BLOCK = np.array([[1, -1, -1], [-1, 1, -1], [1, -1, 1]])
BATCH = 256


def corner_pattern(size: int) -> np.ndarray:
    """Signs of the trigger, float32 [size, size] of −1, 0 and 1; the blocks grow with images above 32×32."""
    side = max(3, round(3 * size / 32))
    near = np.arange(side) * 3 // side
    block = LEFT_BLOCK[np.ix_(near, near)]
    pattern = np.zeros((size, size), np.float32)
    for rows in (slice(0, side), slice(size - side, size)):
        pattern[rows, :side], pattern[rows, size - side :] = block, block[:, ::-1]
    return pattern


def ascend(network: nn.Module, x: Tensor, y: Tensor, *, eps: float, step: float, steps: int) -> Tensor:
    """Projected gradient ascent of the cross-entropy from x itself, L∞; float pixels [B, C, H, W] in [0, 1]."""
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(network(x), y, reduction="sum"), x)
        x = torch.clamp(x + step * slope.sign(), low, high)
    return x.detach()


@attack("lc")
@dataclass(frozen=True)
class LabelConsistent(Attack):
    """Label-consistent attack: the policy is always `clean`.

    `tensors` from `prepare`: `indices` int64 [T], all training images of the target class, ascending; `images` uint8
    [T, H, W, C], their adversarial versions without corners; `accuracy_before`, `accuracy`, shares of them that the
    network recognises, clean and adversarial.

    Attributes:
        eps: bound of the perturbation, in grey levels of 255 (the released generator: 8; the file that BackdoorBench
            asks for: 16).
        step, steps: size, in grey levels, and number of gradient steps. Under a small `smaller` there are still enough
            of them to reach the bound.
        amplitude: of the corners, as a share of 255.
        robust_epochs: epochs of adversarial training of a fresh network; 0: the network given is attacked.
        robust_steps: gradient steps per batch in that training, of size 2.5·eps/robust_steps.
        robust_lr: its learning rate (SGD, cosine, batch 128, crops of 4 pixels, no flips).

    Raises:
        ValueError: another policy; `stamp_training` before `prepare`, or of images that are not in `tensors`.
    """

    policy: str = "clean"
    eps: float = 8.0
    step: float = 1.5
    steps: int = 100
    amplitude: float = 1.0
    robust_epochs: int = 0
    robust_steps: int = 3
    robust_lr: float = 0.05

    needs: ClassVar[str] = "clean_model"

    def __post_init__(self):
        if self.policy != "clean":
            raise ValueError(f"the label-consistent attack keeps labels: its policy is clean, not {self.policy!r}")

    def robust(self, dataset: Dataset, model, seed: int, device: str, smaller: float) -> nn.Module:
        """A network of the architecture of `model`, adversarially trained on `dataset` from scratch."""
        network = build(**{**model.spec, "seed": derive(seed, "lc", "initial")})
        eps = self.eps / 255

        def objective(run, x, y):
            # Batch statistics of the search's intermediate images must not enter the running ones.
            run.eval()
            hard = ascend(run, x, y, eps=eps, step=2.5 * eps / self.robust_steps, steps=self.robust_steps)
            logits = run.train()(hard)
            return F.cross_entropy(logits, y), logits

        recipe = Recipe(epochs=share(self.robust_epochs, smaller), lr=self.robust_lr, flip=False)
        fit(network, dataset.images, dataset.labels, recipe, seed=derive(seed, "lc", "robust"), device=device,
            objective=objective, title="lc robust")
        return network

    def prepare(self, dataset: Dataset, model, target: int, seed: int, *, device: str = "cpu",
                smaller: float = 1.0) -> dict[str, np.ndarray]:
        if self.robust_epochs:
            model = self.robust(dataset, model, seed, device, smaller)
        network = frozen(model, device)
        indices = np.flatnonzero(np.asarray(dataset.labels) == target)
        steps = max(share(self.steps, smaller), int(np.ceil(self.eps / self.step)))
        images, right, progress = [], np.zeros(2), Progress("lc", len(indices))
        for start in range(0, len(indices), BATCH):
            x = to_pixels(upload(dataset.images[indices[start : start + BATCH]], device))
            y = torch.full((len(x),), target, device=device)
            hard = ascend(network, x, y, eps=self.eps / 255, step=self.step / 255, steps=steps)
            right += [(network(z).argmax(1) == y).sum().item() for z in (x, hard)]
            images.append((hard * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
            progress(len(x), f"{steps} steps each")
        progress.close()
        return {"indices": indices, "images": np.concatenate(images),
                "accuracy_before": np.float64(right[0] / len(indices)), "accuracy": np.float64(right[1] / len(indices))}

    def stamp(self, images: np.ndarray) -> np.ndarray:
        return quantise(images + np.float32(255 * self.amplitude) * corner_pattern(images.shape[1])[..., None])

    def stamp_training(self, dataset: Dataset, indices: np.ndarray) -> np.ndarray:
        known = self.made("indices")
        missing = np.setdiff1d(indices, known)
        if len(missing):
            raise ValueError(f"LC has adversarial images of {len(known)} training samples, but not of {len(missing)} "
                             f"asked for (first: {missing[0]}): prepare() was called with another target or data set")
        return self.stamp(self.tensors["images"][np.searchsorted(known, indices)])
