"""The victim asked about purified test pictures (bye SPEC 7).

A picture defence is a function of images float [B, 3, H, W] in [-1, 1] and a generator for its noise, with its own settings
as keyword arguments, registered by `@picture_defence("name")`, here or in a plugin; it returns images of the same form. ZIP
(Shi et al., 2023) puts back by a diffusion model what two linear degradations took away; without a diffusion model only the
degradations are left, under their own names.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from cupel import cells, job
from cupel.evaluation.metrics import destroyed
from cupel.files import write_json
from cupel.limits import check
from cupel.registry import Registry
from cupel.rng import torch_rng
from cupel.vision_language import prepared
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.stages import dtype_of, measure

BATCH_SIZE = 64  # pictures of one size that are purified together

picture_defence = Registry("picture defence", __name__)


@picture_defence("grey")
def grey(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A†A of the grey-scale degradation: the mean of the channels, in all channels."""
    return images.mean(1, keepdim=True).expand_as(images)


@picture_defence("downsample")
def downsample(images: torch.Tensor, generator: torch.Generator | None = None, *, scale: int = 2) -> torch.Tensor:
    """A†A of average pooling by `scale`: means of blocks, repeated over the block. ZIP's code pools by 2 or 4.

    Raises:
        ValueError: height or width is no multiple of `scale`.
    """
    if images.shape[-1] % scale or images.shape[-2] % scale:
        raise ValueError(f"images of {images.shape[-2]}x{images.shape[-1]} pixels cannot be pooled by {scale}")
    return F.avg_pool2d(images, scale).repeat_interleave(scale, -1).repeat_interleave(scale, -2)


@picture_defence("blur")
def blur(images: torch.Tensor, generator: torch.Generator | None = None, *, sigma: float = 1.0) -> torch.Tensor:
    """Gaussian blur of standard deviation `sigma` pixels, edges repeated."""
    reach = max(int(3 * sigma + 0.5), 1)
    x = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    for pad, shape in (((0, 0, reach, reach), (-1, 1)), ((reach, reach, 0, 0), (1, -1))):
        weight = kernel.reshape(1, 1, *shape).repeat(images.shape[1], 1, 1, 1)
        images = F.conv2d(F.pad(images, pad, mode="replicate"), weight, groups=images.shape[1])
    return images


def zip_restore(images: torch.Tensor, noise_of: Callable[[torch.Tensor, int], torch.Tensor], projections: Sequence[Callable],
                *, generator: torch.Generator, steps: int = 20, exponent: float = 1.0) -> torch.Tensor:
    """ZIP's restoration of degraded images by a diffusion model (bye SPEC 7, [O]).

    Args:
        images: [B, 3, H, W] in [-1, 1].
        noise_of: from noisy images and the time 0 ... 999 to the noise that the model sees in them.
        projections: A†A of each degradation; the results of all are averaged in every step.
        generator: of the noise.
        steps: of sampling, evenly spread over the diffusion model's linear schedule.
        exponent: c of the weight ᾱ^c with which the unguided state comes in.

    Returns:
        [B, 3, H, W] in [-1, 1].
    """
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    times = np.linspace(0, 999, steps).round().astype(int)[::-1]

    def draw():
        return torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)

    state = draw()
    for k, time_ in enumerate(times):
        now = float(kept[time_])
        after = float(kept[times[k + 1]]) if k + 1 < steps else 1.0
        eps = noise_of(state, int(time_))
        guided = torch.stack([now**0.5 * project(images) + state - project(state) + (1 - now) ** 0.5 * project(eps)
                              for project in projections]).mean(0)
        mixed = (1 - now**exponent) * guided + now**exponent * state
        clean = (mixed - (1 - now) ** 0.5 * eps) / now**0.5
        spread = ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
        state = after**0.5 * clean + max(1 - after - spread**2, 0.0) ** 0.5 * eps
        if k + 1 < steps:
            state = state + spread * draw()
    return state.clamp(-1, 1)


@lru_cache(maxsize=1)
def diffusion(model: str, revision: str, device: torch.device) -> tuple[Callable, int]:
    """The noise predictor of an unconditional diffusion model of the hub, and the side of its images in pixels.

    Raises:
        RuntimeError: the package `diffusers` is not installed.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise RuntimeError("purification by a diffusion model needs the package diffusers (`pip install diffusers`); "
                           "without it use blur, grey or downsample") from None
    network = UNet2DModel.from_pretrained(model, revision=revision, use_safetensors=True).to(device).eval()

    def noise_of(state: torch.Tensor, time_: int) -> torch.Tensor:
        with torch.inference_mode():
            return network(state, time_).sample[:, :3]

    return noise_of, int(network.config.sample_size)


def _resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


@picture_defence("zip")
def zip_(images: torch.Tensor, generator: torch.Generator, *, model: str = "", revision: str = "main", scale: int = 2,
         degradations: Sequence[str] = ("grey", "downsample"), steps: int = 20, exponent: float = 1.0) -> torch.Tensor:
    """ZIP: degradations, and restoration by a diffusion model, to whose size images are resized, and back.

    Args:
        images, generator: as for every picture defence.
        model, revision: of the hub; see `diffusion`.
        scale, degradations: of `downsample`; names of those combined.
        steps, exponent: see `zip_restore`.
    """
    noise_of, side = diffusion(model, revision, images.device)
    known = {"grey": grey, "blur": blur, "downsample": lambda x: downsample(x, scale=scale)}
    restored = zip_restore(_resized(images, (side, side)), noise_of, [known[name] for name in degradations],
                           generator=generator, steps=steps, exponent=exponent)
    return _resized(restored, images.shape[-2:])


def purify(name: str, images: np.ndarray, *, seed: int = 0, device: str | torch.device = "cpu", **given) -> np.ndarray:
    """Purify test images of one size, uint8 [B, H, W, 3], by a registered defence; `given` are its settings.

    Raises:
        ValueError: an unknown defence, a setting that it does not have, or a result of another shape or with values that are
            not finite.
    """
    function, settings = picture_defence.find(name), picture_defence.settings(name, given)
    check("vision_language", "defences", name, function, settings)
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = function(x, torch_rng(seed, name), **settings)
    if not isinstance(found, torch.Tensor) or found.shape != x.shape or not found.isfinite().all():
        raise ValueError(f"picture defence {name!r} must return finite images of shape {list(x.shape)}, but returned "
                         f"{list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__}")
    return ((found + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def purified_copy(source: str | Path, folder: str | Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """A prepared folder with the test split of another, its pictures changed, uint8 [B, H, W, 3] to the same."""
    def fill(pictures: prepared.Pictures, names: list[str]) -> None:
        by_size: dict[tuple, list[int]] = {}
        for k, name in enumerate(names):
            by_size.setdefault(prepared.read_picture(source, name).shape, []).append(k)
        for numbers in by_size.values():
            for first in range(0, len(numbers), BATCH_SIZE):
                part = numbers[first : first + BATCH_SIZE]
                changed = change(np.stack([prepared.read_picture(source, names[k]) for k in part]))
                for k, pixels in zip(part, changed, strict=True):
                    pictures.put(k, pixels)

    prepared.copy_test(source, folder, fill)


def purify_pictures(spec: dict, defence: dict, inputs: Inputs, outputs: dict, device: str) -> None:
    """Purify the test pictures, untouched and triggered, and ask the victim about them.

    Args:
        spec, defence: of the victim; a picture defence and its settings.
        inputs: `victim`, `before`, `data`, `triggered`.
        outputs: paths `history` (empty), `clean`, `triggered` (answers), `metrics`.
        device: `cpu` or `cuda`.
    """
    from cupel.vision_language import models

    record = cells.identity(spec, "purified", defence)
    try:
        known = cells.past(inputs.before, inputs.victim)
        started, same = time.perf_counter(), []

        def change(pictures: np.ndarray) -> np.ndarray:
            found = purify(defence["function"], pictures, seed=spec["seed"], device=device, **defence["settings"])
            same.append(np.array_equal(found, pictures))
            return found

        with tempfile.TemporaryDirectory(prefix=".pictures-", dir=Path(outputs["metrics"]).parent) as scratch:
            folders = [Path(scratch) / name for name in ("clean", "triggered")]
            for folder, origin in zip(folders, (inputs.data, inputs.triggered), strict=True):
                purified_copy(origin, folder, change)
            seconds = time.perf_counter() - started
            model = models.load(inputs.victim, dtype=dtype_of(spec), device=device)
            measured = measure(model, spec, Inputs(data=folders[0], triggered=folders[1]), outputs)
        cells.write_history(outputs["history"], [])
        write_json(outputs["metrics"], {
            **record, **measured, **job.costs(), "status": "ok", "clean_samples": 0, "device": device, "unchanged": all(same),
            "destroyed": destroyed(known, measured), "rate_reached": known["rate_reached"], "seconds": seconds,
            "cp_before": known["cp"], "asr_before": known["asr"]})
    except Exception as error:
        cells.fail(error, {**record, "metrics": ["cp", "asr"]}, outputs)
