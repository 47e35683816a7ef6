"""What BYE is compared with: other ways to flag samples, and purification of test images (bye SPEC 7).

Each way to flag takes the entropies [N, L] and gives bool [N], True for samples to remove. Image purification is ZIP
(Shi et al., 2023): two linear degradations and a diffusion model that puts back what they took away. Without a diffusion
model only the degradations are left, under their own names.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from cupel.rng import rng, torch_rng
from cupel.vision_language.filter import TAU, filled, mixture, run

#: nats, of the paper, for both of its models (bye SPEC 7)
THRESHOLD = 4.5
#: the same as a share of the largest possible entropy ln 576 of LLaVA-1.5 (bye SPEC 11.3)
THRESHOLD_SHARE = 0.708


def _aggregated(entropies: np.ndarray, rule: str, tau: float) -> np.ndarray | None:
    """Mean over the sensitive layers, float64 [N]; None if there are none."""
    return run(entropies, rule=rule, tau=tau, taus=()).score


def _mean(entropies: np.ndarray) -> np.ndarray:
    return filled(entropies)[0].mean(1)


def _below(score: np.ndarray | None, n: int, threshold: float) -> np.ndarray:
    return np.zeros(n, bool) if score is None else score < threshold


def threshold_for(image_tokens: int) -> float:
    """The fixed threshold for another number of image tokens, 0.708 · ln T nats."""
    return THRESHOLD_SHARE * float(np.log(image_tokens))


def no_filter(entropies: np.ndarray) -> np.ndarray:
    """Vanilla fine-tuning: nothing is flagged."""
    return np.zeros(len(entropies), bool)


def random_drop(entropies: np.ndarray, *, seed: int, share: float = 0.2) -> np.ndarray:
    """⌊share · N⌋ samples drawn uniformly without replacement."""
    flagged = np.zeros(len(entropies), bool)
    flagged[rng(seed, "random_drop").permutation(len(entropies))[: int(share * len(entropies))]] = True
    return flagged


def fixed_threshold(entropies: np.ndarray, *, threshold: float = THRESHOLD) -> np.ndarray:
    """Mean entropy over all layers below a threshold: without GMM and without BSI."""
    return _below(_mean(entropies), len(entropies), threshold)


def without_gmm(entropies: np.ndarray, *, threshold: float = THRESHOLD, rule: str = "sum", tau: float = TAU) -> np.ndarray:
    """Aggregated entropy of the sensitive layers below a threshold; nothing without a sensitive layer."""
    return _below(_aggregated(entropies, rule, tau), len(entropies), threshold)


def without_bsi(entropies: np.ndarray) -> np.ndarray:
    """Low component of the mixture on the mean over all layers."""
    return mixture(_mean(entropies)).low


def two_means(entropies: np.ndarray, *, rule: str = "sum", tau: float = TAU) -> np.ndarray:
    """Cluster with the lower centre of 2-means on the aggregated entropy; nothing without a sensitive layer.

    The paper does not give the settings of its K-means; these are scikit-learn's with 10 starts and a fixed state.
    """
    from sklearn.cluster import KMeans

    score = _aggregated(entropies, rule, tau)
    if score is None or len(np.unique(score)) < 2:
        return np.zeros(len(entropies), bool)
    found = KMeans(n_clusters=2, n_init=10, random_state=0).fit(score[:, None])
    return found.labels_ == int(found.cluster_centers_[:, 0].argmin())


def oracle(entropies: np.ndarray, *, poisoned: np.ndarray, seed: int, recall: float = 1.0) -> np.ndarray:
    """round(recall · K) of the K poisoned samples, drawn uniformly, and no clean one: the dose for a dose-response curve.

    Args:
        entropies: only their number is used.
        poisoned: bool [N], the truth.
        seed: of the draw; what a lower recall finds, a higher one finds too.
        recall: share to find.
    """
    where = np.flatnonzero(poisoned)
    flagged = np.zeros(len(entropies), bool)
    flagged[rng(seed, "oracle").permutation(where)[: round(recall * len(where))]] = True
    return flagged


FLAGGERS: dict[str, Callable[..., np.ndarray]] = {
    "vanilla": no_filter, "random_drop": random_drop, "fixed_threshold": fixed_threshold, "without_gmm": without_gmm,
    "without_bsi": without_bsi, "two_means": two_means, "oracle": oracle,
}


# ------------------------------------------------------------------------------------------------- purification of images


def grey(images: torch.Tensor) -> torch.Tensor:
    """A†A of the grey-scale degradation: the mean of the channels, in all channels. [B, C, H, W] to the same."""
    return images.mean(1, keepdim=True).expand_as(images)


def pooled(images: torch.Tensor, scale: int) -> torch.Tensor:
    """A†A of average pooling by `scale`: means of blocks, repeated over the block. [B, C, H, W] to the same.

    Raises:
        ValueError: height or width is no multiple of `scale`.
    """
    if images.shape[-1] % scale or images.shape[-2] % scale:
        raise ValueError(f"images of {images.shape[-2]}x{images.shape[-1]} pixels cannot be pooled by {scale}")
    return F.avg_pool2d(images, scale).repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of standard deviation `sigma` pixels, edges repeated. [B, C, H, W] to the same."""
    reach = max(int(3 * sigma + 0.5), 1)
    x = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(images.shape[1], 1, 1)
    for axis in (2, 3):
        pad, shape = ((0, 0, reach, reach), (-1, 1)) if axis == 2 else ((reach, reach, 0, 0), (1, -1))
        weight = kernel.reshape(images.shape[1], 1, *[2 * reach + 1 if size == -1 else 1 for size in shape])
        images = F.conv2d(F.pad(images, pad, mode="replicate"), weight, groups=images.shape[1])
    return images


def _resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def zip_restore(images: torch.Tensor, noise_of: Callable[[torch.Tensor, int], torch.Tensor], projections: Sequence[Callable],
                *, generator: torch.Generator, steps: int = 20, exponent: float = 1.0, total: int = 1000,
                beta: tuple[float, float] = (1e-4, 0.02)) -> torch.Tensor:
    """ZIP's restoration of degraded images by a diffusion model (bye SPEC 7, [O]).

    Args:
        images: [B, 3, H, W] in [-1, 1].
        noise_of: from noisy images and the time 0 ... total - 1 to the noise that the model sees in them.
        projections: A†A of each degradation; the results of all are averaged in every step.
        generator: of the noise.
        steps: of sampling, evenly spread over `total`.
        exponent: c of the weight ᾱ^c with which the unguided state comes in.
        total, beta: of the diffusion model's linear schedule.

    Returns:
        [B, 3, H, W] in [-1, 1].
    """
    kept = torch.cumprod(1 - torch.linspace(*beta, total, dtype=torch.float64), 0)
    times = np.linspace(0, total - 1, steps).round().astype(int)[::-1]

    def draw():
        return torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)

    state = draw()
    for k, time in enumerate(times):
        now = float(kept[time])
        after = float(kept[times[k + 1]]) if k + 1 < steps else 1.0
        eps = noise_of(state, int(time))
        guided = torch.stack([now**0.5 * project(images) + state - project(state) + (1 - now) ** 0.5 * project(eps)
                              for project in projections]).mean(0)
        mixed = (1 - now**exponent) * guided + now**exponent * state
        clean = (mixed - (1 - now) ** 0.5 * eps) / now**0.5
        spread = ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
        state = after**0.5 * clean + max(1 - after - spread**2, 0.0) ** 0.5 * eps
        if k + 1 < steps:
            state = state + spread * draw()
    return state.clamp(-1, 1)


def diffusion(model_id: str, revision: str = "main", device: str | torch.device = "cpu") -> tuple[Callable, int]:
    """The noise predictor of an unconditional diffusion model of the hub, and the side of its images in pixels.

    Raises:
        RuntimeError: the package `diffusers` is not installed.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise RuntimeError("purification by a diffusion model needs the package diffusers (`pip install diffusers`); "
                           "without it use the methods blur, grey or downsample") from None
    network = UNet2DModel.from_pretrained(model_id, revision=revision, use_safetensors=True).to(device).eval()

    def noise_of(state: torch.Tensor, time: int) -> torch.Tensor:
        with torch.inference_mode():
            return network(state, time).sample[:, :3]

    return noise_of, int(network.config.sample_size)


def purify(images: np.ndarray, method: str, *, sigma: float = 1.0, scale: int = 2, model: tuple[Callable, int] | None = None,
           degradations: Sequence[str] = ("grey", "downsample"), steps: int = 20, exponent: float = 1.0, seed: int = 0,
           device: str | torch.device = "cpu") -> np.ndarray:
    """Purify test images of one size.

    Args:
        images: uint8 [B, H, W, 3].
        method: `blur` (Gaussian, `sigma`), `grey`, `downsample` (average pooling by `scale`, repeated), or `zip`
            (degradations and restoration by `model`).
        sigma, scale: of the degradations. ZIP's code pools by 2 or 4.
        model: of `diffusion`; images are resized to its size and back.
        degradations: those ZIP combines.
        steps, exponent: see `zip_restore`.
        seed: of the noise.
        device: where to compute.

    Returns:
        uint8 [B, H, W, 3].

    Raises:
        ValueError: unknown method, or `zip` without a model.
    """
    known = {"blur": lambda x: blurred(x, sigma), "grey": grey, "downsample": lambda x: pooled(x, scale)}
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    if method in known:
        found = known[method](x)
    elif method == "zip":
        if model is None:
            raise ValueError("method zip needs a diffusion model (see `diffusion`); without one it would be "
                             "blur, grey or downsample, and is to be called so")
        noise_of, side = model
        size = x.shape[-2:]
        restored = zip_restore(_resized(x, (side, side)), noise_of, [known[name] for name in degradations],
                               generator=torch_rng(seed, "zip"), steps=steps, exponent=exponent)
        found = _resized(restored, size)
    else:
        raise ValueError(f"purification {method!r}: must be one of {', '.join([*known, 'zip'])}")
    return ((found + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
