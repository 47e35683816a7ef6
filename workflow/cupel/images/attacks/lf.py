"""LF (Zeng et al., 2021): one smooth universal perturbation, added to every image (backdoorbench SPEC 4, ims SPEC 3).

    x' = clip(x + v),     v ← scale( v + Σ_i G * δ_i )  for i with h(x_i + v) = h(x_i)

δ_i is the targeted DeepFool perturbation of the i-th image at x_i + v, G a Gaussian low-pass, and scale() the min-max
normalisation to [0, amplitude]. Passes over the images end when v changes enough predictions, or no more of them.

The released generator takes the images one by one and smooths v itself again after each, which drives v to the
leading eigenfunction of the filter, the same blob for every network. Here the images of a pass run in parallel, from
the same v, and only the increments are smoothed.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.images.attacks._preparation import frozen, share
from cupel.images.attacks.base import Attack, attack, quantise
from cupel.images.datasets import Dataset
from cupel.rng import rng
from cupel.training.augment import to_pixels
from cupel.training.engine import upload
from cupel.training.progress import Progress


def low_pass(x: Tensor, taps: int, sigma: float) -> Tensor:
    """Gaussian filter of float [B, C, H, W] with `taps`×`taps` weights of deviation `sigma` pixels, zero padded."""
    place = torch.arange(taps, device=x.device) - (taps - 1) / 2
    weight = torch.exp(-0.5 * (place / sigma) ** 2)
    weight = (weight / weight.sum()).expand(x.shape[1], 1, 1, taps)
    # An even kernel has no centre: the shorter half goes first.
    before, after = (taps - 1) // 2, taps // 2
    x = F.conv2d(F.pad(x, (before, after, 0, 0)), weight, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, before, after)), weight.mT, groups=x.shape[1])


def targeted_deepfool(network: nn.Module, x: Tensor, target: int, steps: int, overshoot: float) -> Tensor:
    """Perturbations float [B, C, H, W] that bring each of float pixels [B, C, H, W] to class `target`.

    Each step linearises the margin g between the leading class and the target and crosses its zero,
    δ ← δ − g/‖∇g‖²·∇g; what is returned is (1 + overshoot)·δ. It is zero for images that are in the class already and
    for those that `steps` steps do not bring there.
    """
    total = torch.zeros_like(x)
    moving = torch.arange(len(x), device=x.device)
    for step in range(steps + 1):
        if len(moving) == 0:
            break
        point = (x[moving] + (1 + overshoot) * total[moving]).requires_grad_()
        logits = network(point)
        leading = logits.argmax(1)
        margin = logits.gather(1, leading[:, None])[:, 0] - logits[:, target]
        (slope,) = torch.autograd.grad(margin.sum(), point)
        outside = leading != target
        if step == steps:
            total[moving[outside]] = 0
            break
        length = margin.detach() / slope.square().sum((1, 2, 3)).clamp_min(1e-12)
        moving, change = moving[outside], length[outside, None, None, None] * slope[outside]
        total[moving] -= change
    return (1 + overshoot) * total


def checked(pattern: np.ndarray, scaled: bool) -> np.ndarray:
    """The pattern [H, W, C] in the form in which it is added to grey levels.

    Raises:
        ValueError: it changes no pixel although it is `scaled`, or has no such shape.
    """
    if pattern.ndim == 4 and len(pattern) == 1:
        pattern = pattern[0]  # the float files are released as a batch of one
    if pattern.ndim != 3 or pattern.dtype.kind not in "uif":
        raise ValueError(f"an LF pattern is a numeric array [H, W, C], not {pattern.dtype} {pattern.shape}")
    if scaled and pattern.dtype.kind == "f" and np.abs(pattern).max() <= 1:
        pattern = pattern * np.float32(255)
    if scaled and pattern.min() >= 0 and pattern.max() < 1:
        raise ValueError(f"the LF pattern lies in [{pattern.min():g}, {pattern.max():g}] grey levels: after truncation "
                         "it changes no pixel, so there is no trigger")
    return pattern


@lru_cache(maxsize=8)
def released(path: str, scaled: bool) -> np.ndarray:
    """A pattern file `.npy`, see `checked`; nothing is unpickled."""
    return checked(np.load(path, allow_pickle=False), scaled)


@attack("lf")
@dataclass(frozen=True)
class LowFrequency(Attack):
    """Low-frequency universal perturbation.

    `tensors` from `prepare`: `pattern` uint8 [H, W, C] in grey levels, 0 to 255·amplitude; `fooling_rate` and
    `target_rate`, shares of the images used whose prediction the pattern changes, and changes to the target; `passes`
    done. With a file in `pattern` no network is needed, and `pattern` is all there is.

    Attributes:
        pattern: `.npy` of the user, e.g. a released one, uint8 0..51 or float in [0, 0.2], [H, W, C] or [1, H, W, C].
        scaled: True brings float files in [0, 1] to grey levels (×255). False adds them as they are, as released:
            after truncation no pixel changes (ims SPEC 10.3).
        amplitude: largest value of the pattern, as a share of 255.
        samples: training images used, drawn from all classes.
        passes: over the images, at most.
        steps, overshoot: of DeepFool.
        kernel: taps of the low-pass in each direction.
        sigma: its deviation in pixels. backdoorbench SPEC 4 gives none; at 6 the released filter's weights result.
        fooling: share of changed predictions that ends the passes; they end as well when it varies by less than
            0.01 over 5 passes.

    Raises:
        ValueError: in `prepare`, if DeepFool moves no image, so that there is no pattern; in `stamp`, if the pattern
            does not fit the images, or changes no pixel although `scaled`.
    """

    pattern: str = ""
    scaled: bool = True
    amplitude: float = 0.2
    samples: int = 100
    passes: int = 50
    steps: int = 200
    overshoot: float = 0.02
    kernel: int = 30
    sigma: float = 6.0
    fooling: float = 0.2

    needs: ClassVar[str] = "clean_model"

    def __post_init__(self):
        if self.pattern:
            object.__setattr__(self, "needs", "")

    def prepare(self, dataset: Dataset, model, target: int, seed: int, *, device: str = "cpu",
                smaller: float = 1.0) -> dict[str, np.ndarray]:
        if self.pattern:
            return {"pattern": released(self.pattern, self.scaled)}
        network = frozen(model, device)
        chosen = rng(seed, "lf", "samples").choice(len(dataset), min(self.samples, len(dataset)), replace=False)
        x = to_pixels(upload(dataset.images[np.sort(chosen)], device))
        clean = network(x).argmax(1)
        v = torch.zeros_like(x[:1])
        changed, rates = torch.zeros_like(clean, dtype=torch.bool), []
        progress = Progress("lf", share(self.passes, smaller), unit="passes")
        for _ in range(progress.total):
            steps = share(self.steps, smaller)
            increments = targeted_deepfool(network, (x + v).clamp(0, 1)[~changed], target, steps, self.overshoot)
            # The filter is linear: the sum of the smoothed increments is the smoothed sum.
            v = v + low_pass(increments.sum(0, keepdim=True), self.kernel, self.sigma)
            extent = v.max() - v.min()
            if extent == 0:
                raise ValueError(f"LF: within {steps} steps DeepFool brought none of {len(x)} images to class {target}"
                                 ", or the network predicts that class for all of them; raise steps, or train the "
                                 "clean network for longer")
            v = (v - v.min()) / extent * self.amplitude
            label = network((x + v).clamp(0, 1)).argmax(1)
            changed = label != clean
            rates.append(changed.float().mean().item())
            progress(1, f"{100 * rates[-1]:.0f} % of the predictions changed")
            if rates[-1] >= self.fooling or (len(rates) >= 5 and max(rates[-5:]) - min(rates[-5:]) < 0.01):
                break
        progress.close()
        grey = (v[0] * 255).round().permute(1, 2, 0).cpu().numpy()
        return {"pattern": checked(quantise(grey), self.scaled), "fooling_rate": np.float64(rates[-1]),
                "target_rate": np.float64((changed & (label == target)).float().mean().item()),
                "passes": np.int64(len(rates))}

    def stamp(self, images: np.ndarray) -> np.ndarray:
        from_file = self.pattern and "pattern" not in self.tensors
        pattern = released(self.pattern, self.scaled) if from_file else checked(self.made("pattern"), self.scaled)
        if pattern.shape != images.shape[1:]:
            raise ValueError(f"the LF pattern is made for images {pattern.shape}, not {images.shape[1:]}")
        return quantise(images + pattern.astype(np.float32))
