"""TrojanNN (Liu et al., 2018): a trigger that excites chosen neurons of a clean network (backdoorbench SPEC 4).

    t = argmin_t Σ_{k ∈ S} (φ_k(t) − a)²     subject to |t − m| ≤ eps, 0 ≤ t ≤ 1, t = 0 outside the mask
    x' = clip(x + t)

φ are the penultimate features, S those with the largest Σ_c |W_ck| in the head W, m a white shape on black ground. t
alone, on black, is what the network sees meanwhile; signed gradient steps of size alpha.

Three slips of the released script are not followed: it chooses S on a head that stays random, because the checkpoint's
head does not fit, shows t to the network without normalising it, and adds modulo 256 before it clips. The second and the
third are a variant here, `normalised` and `wrap`.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from cupel.images.attacks._preparation import frozen, opened, share
from cupel.images.attacks.base import Attack, attack, quantise
from cupel.images.datasets import Dataset


def apple(size: int) -> np.ndarray:
    """The shape of an apple, bool [size, size]: two lobes, a stem and a leaf.

    At 32 pixels it has 118 of them, in rows 16 to 29 and columns 17 to 28; the released drawing has 117 there.
    """
    y, x = (np.mgrid[:size, :size] + 0.5) * 32 / size
    lobes = [((y - 24.6) / 5.2) ** 2 + ((x - centre) / 3.4) ** 2 <= 1 for centre in (20.4, 25.6)]
    stem = (np.abs(x - 23) < 0.6) & (np.abs(y - 19) < 2)
    leaf = (x - y - 7.2) ** 2 / 6.4 + (x + y - 42) ** 2 / 1.2 <= 1
    return lobes[0] | lobes[1] | stem | leaf


@attack("trojannn")
@dataclass(frozen=True)
class TrojanNN(Attack):
    """Neuron-exciting additive trigger.

    `tensors` from `prepare`: `trigger` uint8 [H, W, C]; `neurons` int64 [n], the features chosen;
    `activations_before`, `activations` float32 [n], theirs on the white mask and on the trigger.

    Attributes:
        mask: image file of the user, e.g. the released one, resized bilinearly: t may be non-zero where it is not
            black, and m is its grey value; empty: the apple drawn by `apple`, in white.
        neurons: how many features are excited.
        activation: the value a that they should reach.
        steps, alpha, eps: of the optimisation; sizes in units of pixels in [0, 1].
        tolerance: loss at which it ends early.
        normalised: t passes through the network's normalisation, as images do; the released code leaves it out.
        wrap: add modulo 256 instead of clipping at 255, as the released code does.

    Raises:
        ValueError: in `prepare`, if the mask file is black, or the network does not depend on the mask's pixels.
    """

    mask: str = ""
    neurons: int = 2
    activation: float = 100.0
    steps: int = 1000
    alpha: float = 0.1
    eps: float = 0.3
    tolerance: float = 1e-3
    normalised: bool = True
    wrap: bool = False

    needs: ClassVar[str] = "clean_model"

    def start(self, size: int, channels: int) -> np.ndarray:
        """m: where and from which value the optimisation starts, float32 [size, size, channels] in [0, 1]."""
        if not self.mask:
            return np.repeat(apple(size)[..., None], channels, -1).astype(np.float32)
        grey = opened(self.mask, size, channels).astype(np.float32) / 255
        if not grey.any():
            raise ValueError(f"mask {self.mask} is black at {size}×{size}: TrojanNN has no pixels for its trigger")
        return grey

    def prepare(self, dataset: Dataset, model, target: int, seed: int, *, device: str = "cpu",
                smaller: float = 1.0) -> dict[str, np.ndarray]:
        network = frozen(model, device)
        chosen = network.head.weight.abs().sum(0).topk(self.neurons).indices
        mask = torch.from_numpy(self.start(dataset.image_size, dataset.images.shape[-1]))
        mask = mask.permute(2, 0, 1)[None].to(device)
        low, high = (mask - self.eps).clamp_min(0) * (mask > 0), (mask + self.eps).clamp_max(1) * (mask > 0)
        t, best, before = mask, None, None
        # The last of these points is only judged, not left.
        for step in range(share(self.steps, smaller) + 1):
            t = t.detach().requires_grad_()
            pixels = t if self.normalised else t * network.normalize.std + network.normalize.mean
            activations = network.features(pixels)[0, chosen]
            loss = (activations - self.activation).square().sum()
            (slope,) = torch.autograd.grad(loss, t)
            if step == 0:
                before = activations.detach()
                if not slope[mask > 0].any():
                    raise ValueError("TrojanNN: the chosen features do not depend on the mask's pixels; train the "
                                     "clean network for longer, or give another mask")
            # Signed steps of a third of the box overshoot: the best point is kept, not the last.
            if best is None or loss < best[0]:
                best = loss.detach(), t.detach(), activations.detach()
            if loss < self.tolerance:
                break
            t = (t - self.alpha * slope.sign()).clamp(low, high)
        grey = (best[1][0] * 255).round().permute(1, 2, 0).cpu().numpy()
        return {"trigger": quantise(grey), "neurons": chosen.cpu().numpy(),
                "activations_before": before.cpu().numpy(), "activations": best[2].cpu().numpy()}

    def stamp(self, images: np.ndarray) -> np.ndarray:
        trigger = self.made("trigger")
        if trigger.shape != images.shape[1:]:
            raise ValueError(f"the TrojanNN trigger is made for images {trigger.shape}, not {images.shape[1:]}")
        total = images + trigger.astype(np.int16)
        return (total % 256).astype(np.uint8) if self.wrap else quantise(total)
