"""SIG (Barni et al., 2019): a horizontal sine wave added to the image; the labels are clean (backdoorbench SPEC 4).

    x'[i, j] = clip(x[i, j] + delta·sin(2π·f·j / W), 0, 255)     j = column, W = width; same for all rows and colours

As released it cannot be built where the target class holds too few images for the rate (GTSRB, Tiny; ims SPEC 10.4).
Which way out the papers took is unknown, so it is a factor: `sig_policy`.
"""

from dataclasses import dataclass, replace

import numpy as np

from cupel.images.attacks.base import Attack, PoisonRecord, attack, quantise
from cupel.images.datasets import Dataset

SIG_POLICIES = ("clean_label", "dirty_label", "capped")


@attack("sig")
@dataclass(frozen=True)
class SIG(Attack):
    """Sinusoidal signal.

    Attributes:
        delta: amplitude in grey levels of 255 (backdoorbench SPEC 4: 40).
        f: periods over the width of the image (6).
        sig_policy: `clean_label` as released: target-class images only, and an impossible rate is an error;
            `capped`: the same, but an impossible rate takes the whole target class, so that the record's
            `rate_reached` is less than its `poison_rate`; `dirty_label`: images of any class, relabelled as `policy` says.
            The first two set `policy` to `clean`.

    Raises:
        ValueError: unknown `sig_policy`, or one that contradicts `policy`.
    """

    delta: float = 40.0
    f: float = 6.0
    sig_policy: str = "clean_label"

    def __post_init__(self):
        if self.sig_policy not in SIG_POLICIES:
            raise ValueError(f"unknown sig_policy {self.sig_policy!r}: known are {', '.join(SIG_POLICIES)}")
        if self.sig_policy == "dirty_label":
            if self.policy == "clean":
                raise ValueError("sig_policy dirty_label relabels: policy must be all2one or all2all, not clean")
            return
        if self.policy == "all2all":
            raise ValueError(f"sig_policy {self.sig_policy} keeps labels: policy all2all needs sig_policy dirty_label")
        object.__setattr__(self, "policy", "clean")

    def stamp(self, images: np.ndarray) -> np.ndarray:
        width = images.shape[2]
        # In float32 the sum swallows sin(kπ) ≈ 1e-16, which in float64 would push whole grey levels below themselves
        # and truncation would then take one off.
        wave = (self.delta * np.sin(2 * np.pi * self.f * np.arange(width) / width)).astype(np.float32)
        return quantise(images + wave[:, None])

    def poison(self, dataset: Dataset, poison_rate: float, target: int, rng: np.random.Generator) -> PoisonRecord:
        if self.sig_policy != "capped":
            return super().poison(dataset, poison_rate, target, rng)
        possible = float((np.asarray(dataset.labels) == target).mean())
        return replace(super().poison(dataset, min(poison_rate, possible), target, rng), poison_rate=poison_rate)
