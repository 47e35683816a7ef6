"""Attacks that no training of the paper has seen: fog, Gabor noise, snow, JPEG
(proper_interpretability SPEC 3.5; Kang et al. 2019, "UAR").

Each optimises the parameters v of a corruption, not pixels, towards a wrong class t':

    v ← Π( v + α sign ∇ log p_t'( render(x, v) ) ),    α = ε / √200, 200 iterations

    fog        (x + ε F(v)) / (max x + ε),                   F(v) plasma in [0, 1]
    gabor      clip( x + ε G(v) ),                           G(v) noise convolved with random Gabor kernels, in [0, 1]
    snow       clip( bleach(x) + ε Σ_k K_k ∗ v_k⁴ ),         flakes v_k, streaks K_k
    jpeg_p     decode( encode(x) + v/2 ),  ‖v‖_p ≤ ε          DCT coefficients in units of the quantisation table

ε counts in pixel units of 255 for fog and Gabor; 2048 and 400 exceed the range of pixels, and α that of v, so that
every step ends on the border. Images are RGB in [0, 1]. JPEG differs from the released code in one gradient: there the
first of the 200 sees v scaled by ε. Fog is scaled over the whole batch; the paper's are of 40.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.registry import one_of
from cupel.training.adversarial import descend

ITERATIONS = 200
EPSILONS = {"fog": 2048.0, "gabor": 400.0, "snow": 2.0, "jpeg_linf": 0.25, "jpeg_l2": 8.0, "jpeg_l1": 256.0}
"""ε on CIFAR-10; on Restricted ImageNet `jpeg_linf` has 0.062."""

Update = Callable[[Tensor, Tensor, int], Tensor]


def _like(x: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(x)


@dataclass(frozen=True)
class Aim:
    """Where an attack is to go: the network, the wrong classes t' int64 [B], ε, α, and the number of updates."""

    model: nn.Module
    target: Tensor
    eps: float
    step_size: float
    iterations: int

    def reach(self, render: Callable[[Tensor], Tensor], start: Tensor, update: Update) -> Tensor:
        """The image rendered after all updates of v: from v, the gradient of Σ log p_t' there, and their number so far."""
        found = descend(start, lambda v: F.cross_entropy(self.model(render(v)), self.target, reduction="sum"),
                        lambda v, gradient, number: update(v, -gradient, number), steps=self.iterations)
        return render(found).detach()


# ------------------------------------------------------------------------------------------------------------------ fog


def plasma(variables: Tensor, levels: int) -> Tensor:
    """Fractal field by midpoint displacement on a torus, float [B, s, s] with s = 2^levels.

    It is scaled to [0, 1] over the whole batch, as released. The variables, float [B, 4^levels − 1] in [0, 1], are for each
    level of refinement those of centres, upper edges and left edges, n² each with n = 1, 2, 4, ...
    """
    step = side = 2**levels
    field, wibble, begin = variables.new_zeros(len(variables), side, side), 100.0, 0
    for level in range(levels):
        half, end = step // 2, begin + 3 * 4**level
        centre, upper, left = variables[:, begin:end].reshape(-1, 3, 2**level, 2**level).unbind(1)
        corners = field[:, ::step, ::step].clone()
        # each new point: the mean of four neighbours plus a displacement in [-wibble, wibble]
        rows = corners + corners.roll(-1, 1)
        middle = (rows + rows.roll(-1, 2)) / 4 + wibble * (2 * centre - 1)
        field[:, half::step, half::step] = middle
        # the released code rolls the centres by 2, so that one of the four is not the nearest
        across, down = middle + middle.roll(2, 1), middle + middle.roll(2, 2)
        field[:, ::step, half::step] = (across + corners + corners.roll(-1, 2)) / 4 + wibble * (2 * upper - 1)
        field[:, half::step, ::step] = (down + corners + corners.roll(-1, 1)) / 4 + wibble * (2 * left - 1)
        step, begin, wibble = half, end, wibble / 2
    field = field - field.min()
    return field / field.max()


def fog(x: Tensor, aim: Aim, rng: np.random.Generator) -> Tensor:
    """See the module; the field is twice the largest power of two in the side, less a margin, cut to the image."""
    side = x.shape[-1]
    levels = int(np.log2(side)) + 1
    margin = (2**levels - side) // 2
    light, strength = x.amax((2, 3), keepdim=True), aim.eps / 255

    def render(variables: Tensor) -> Tensor:
        field = plasma(variables, levels)[:, None, margin : margin + side, margin : margin + side]
        return ((x + strength * field) / (light + strength)).clamp(0, 1)

    start = np.concatenate([rng.random((len(x), 4**level)) for level in range(levels) for _ in range(3)], 1)
    return aim.reach(render, _like(x, start), lambda v, g, _: (v + aim.step_size * g.sign()).clamp(0, 1))


# ---------------------------------------------------------------------------------------------------------------- gabor


def gabor_kernels(count: int, rng: np.random.Generator, side: int = 23) -> np.ndarray:
    """Sums of 1 to 10 Gabor kernels turned evenly over π, float64 [count, side, side].

    exp(−(x² + y²) / 2(σ + 0.001)²) · cos(2π λ x_θ) on [−1/2, 1/2]²; σ ~ U(.1, .4), λ ~ U(3, side/4), θ ~ U(0, π).
    """
    axis = np.linspace(-0.5, 0.5, side)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    sides = rng.integers(1, 11, count)
    sigma, waves, theta = rng.uniform(0.1, 0.4, count), rng.uniform(3, side / 4, count), rng.uniform(0, np.pi, count)
    turn = np.arange(10)
    angles = theta[:, None] + np.pi * turn / sides[:, None]
    along = x * np.cos(angles)[..., None, None] + y * np.sin(angles)[..., None, None]
    stripes = np.cos(2 * np.pi * waves[:, None, None, None] * along) * (turn < sides[:, None])[..., None, None]
    return stripes.sum(1) * np.exp(-(x**2 + y**2) / (2 * (sigma + 1e-3) ** 2)[:, None, None])


def gabor_noise(variables: Tensor, kernels: Tensor) -> Tensor:
    """Noise in [0, 1], float [B, 1, s, s]: each image's variables [B, s, s] convolved with its kernel [B, 23, 23].

    Deviations from the mean are divided by their own size (plus 0.001), a factor that is a constant for gradients.
    """
    raw = F.conv2d(variables[None], kernels[:, None], padding=kernels.shape[-1] // 2, groups=len(kernels))[0]
    mean = raw.mean((1, 2), keepdim=True).detach()
    size = (raw - mean).abs().detach()
    raw = mean + (raw - mean) * 1.001 / (0.001 + size / size.amax((1, 2), keepdim=True))
    low, high = raw.amin((1, 2), keepdim=True).detach(), raw.amax((1, 2), keepdim=True).detach()
    return ((raw - low) / (high - low))[:, None]


def gabor(x: Tensor, aim: Aim, rng: np.random.Generator) -> Tensor:
    """See the module; one in 14 variables is noise at first. As released, these are the ones left out of the search."""
    side = x.shape[-1]
    kernels = _like(x, gabor_kernels(len(x), rng))
    noisy = rng.permuted(np.arange(side * side) < side * side // 14 * np.ones((len(x), 1)), axis=1)
    start = _like(x, (noisy * rng.uniform(-1, 1, noisy.shape)).reshape(-1, side, side))
    free = (start == 0).to(x)
    return aim.reach(lambda v: (x + aim.eps / 255 * gabor_noise(v, kernels)).clamp(0, 1), start,
                     lambda v, g, _: (v + aim.step_size * g.sign()).clamp(-1, 1) * free)


# ----------------------------------------------------------------------------------------------------------------- snow


def streak(row: int, column: int, width: int, blur: float, side: int = 13) -> np.ndarray:
    """A blurred line through the middle, towards the cell (row, column) below and right of it; float64 [side, side]."""
    middle = side // 2
    steep = row - middle > column - middle
    far, rise = (row, column - middle) if steep else (column, row - middle)
    slope = rise / (far - middle)
    along = np.arange(middle, far + 1)
    thick = width * np.sqrt(1 + slope) / 2
    line = np.zeros((side, side))
    distance = np.abs(np.arange(side)[:, None] - (middle + slope * (along - middle)))
    line[:, along] = np.clip(1 + thick / 2 - distance, 0, 1)
    line[:middle] = 0
    line = line.T if steep else line
    line[: middle + 1, : middle + 1] = line[::-1, ::-1][: middle + 1, : middle + 1].copy()
    bell = np.exp(-((np.arange(3) - 1) ** 2) / (2 * blur**2))
    bell /= bell.sum()
    padded = np.pad(line, 1)
    rows = sum(weight * padded[k : k + side] for k, weight in enumerate(bell))
    return sum(weight * rows[:, k : k + side] for k, weight in enumerate(bell))


def streaks(rng: np.random.Generator, side: int = 13) -> np.ndarray:
    """Seven of them, all mirrored or none; float64 [7, side, side]."""
    mirrored = rng.random() < 0.5
    drawn = [streak(*rng.integers(side // 2 + 2, side, 2), rng.choice([1, 3, 5], p=[0.6, 0.3, 0.1]),
                    rng.uniform(0.41, 0.6), side) for _ in range(7)]
    return np.stack(drawn)[:, :, :: -1 if mirrored else 1]


def snowfall(flakes: Tensor, kernels: Tensor) -> Tensor:
    """Snow, float [B, 1, s, s], of flakes [B, 7, s/4, s/4] on seven shifted grids and kernels [7, 13, 13]."""
    side = 4 * flakes.shape[-1]
    grids = flakes.new_zeros(len(flakes), 7, side, side)
    for k, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0)]):
        grids[:, k, row::4, column::4] = flakes[:, k] ** 4
    return F.conv2d(grids, kernels[None], padding=kernels.shape[-1] // 2)


def snow(x: Tensor, aim: Aim, rng: np.random.Generator, budget: float = 0.2) -> Tensor:
    """See the module; the mean flake of a region of 8x8 is kept below the budget, except after the last step."""
    cells = x.shape[-1] // 4
    kernels = _like(x, streaks(rng))
    grey = (x * x.new_tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1, keepdim=True)
    bleached = 0.75 * x + 0.25 * torch.maximum(x, 1.5 * grey + 0.5)

    def update(flakes: Tensor, gradient: Tensor, number: int) -> Tensor:
        flakes = flakes + aim.step_size * gradient.sign()
        if number == aim.iterations - 1:
            return flakes
        flakes = flakes.clamp(1e-9, 1)
        mean = F.avg_pool2d(flakes, 8).clamp(min=budget)
        return flakes * (budget / mean).repeat_interleave(8, 2).repeat_interleave(8, 3)

    start = _like(x, np.exp(-rng.random((len(x), 7, cells, cells)) / budget))
    return aim.reach(lambda v: (bleached + aim.eps * snowfall(v, kernels)).clamp(0, 1), start, update)


# ----------------------------------------------------------------------------------------------------------------- jpeg

_LUMINANCE = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]], float)
_CHROMINANCE = np.full((8, 8), 99.0)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
_COSINES = np.cos((2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16) / 2
_COSINES[0] /= np.sqrt(2)


def encode(x: Tensor) -> Tensor:
    """DCT coefficients over the quantisation table, not rounded: float [B, 1.5 H W] of pixels [B, 3, H, W] in [0, 1].

    Luminance first, then the two chrominances at half the resolution; blocks of 8x8 row by row.
    """
    planes = torch.einsum("kc,bchw->bkhw", _like(x, _TO_YCC), 255 * x)
    coefficients, basis = [], _like(x, _COSINES)
    # the chrominances' offset of +128 and the centring by -128 cancel
    for plane, table in ((planes[:, :1] - 128, _LUMINANCE), (F.avg_pool2d(planes[:, 1:], 2), _CHROMINANCE)):
        blocks = plane.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
        coefficients.append((basis @ blocks @ basis.T / _like(x, table)).flatten(1))
    return torch.cat(coefficients, 1)


def decode(coefficients: Tensor, height: int, width: int) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1] of what :func:`encode` makes."""
    basis, planes = _like(coefficients, _COSINES), []
    sizes = (1, height, width, _LUMINANCE), (2, height // 2, width // 2, _CHROMINANCE)
    for part, (count, rows, columns, table) in zip(coefficients.split([height * width, height * width // 2], 1), sizes,
                                                   strict=True):
        blocks = part.reshape(-1, count, rows // 8, columns // 8, 8, 8) * _like(coefficients, table)
        planes.append((basis.T @ blocks @ basis).transpose(3, 4).reshape(-1, count, rows, columns))
    chroma = planes[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    ycc = torch.cat([planes[0] + 128, chroma], 1)
    return (torch.einsum("ck,bkhw->bchw", _like(coefficients, _TO_RGB), ycc) / 255).clamp(0, 1)


def frank_wolfe(v: Tensor, gradient: Tensor, eps: float, bound: float = 2.0) -> Tensor:
    """The point of the l1 sphere to move to, float [B, N]: coordinates of largest gradient are pushed by what separates
    them from ±bound until ε is spent."""
    order = gradient.abs().argsort(1, descending=True)
    room = torch.where(gradient > 0, bound - v, bound + v).gather(1, order)
    left = (eps - (room.cumsum(1) - room)).clamp(min=0)
    return torch.zeros_like(v).scatter(1, order, torch.minimum(room, left)) * gradient.sign()


def jpeg(x: Tensor, aim: Aim, rng: np.random.Generator, norm: str) -> Tensor:
    """See the module; `norm` is `linf`, `l2` or `l1`."""
    (height, width), eps, step_size = x.shape[-2:], aim.eps, aim.step_size
    clean = encode(x)
    shape = tuple(clean.shape)
    if norm == "linf":
        start = rng.uniform(-1, 1, shape)
    elif norm == "l2":
        start = rng.normal(size=shape)
        start *= rng.random((shape[0], 1)) ** (1 / shape[1]) / np.linalg.norm(start, axis=1, keepdims=True)
    else:
        start = rng.exponential(size=shape) * rng.choice([-1, 1], shape)
        start /= np.abs(start).sum(1, keepdims=True) + rng.exponential(size=(shape[0], 1))

    def update(v: Tensor, gradient: Tensor, number: int) -> Tensor:
        if norm == "linf":
            return (v + step_size * gradient.sign()).clamp(-eps, eps)
        if norm == "l1":
            return v + (frank_wolfe(v, gradient, eps) - v) / (number + 1)
        v = v + step_size * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return (v * (eps / v.norm(dim=1, keepdim=True)).clamp(max=1)).clamp(-2, 2)

    return aim.reach(lambda v: decode(clean + v / 2, height, width), _like(x, eps * start), update)


ATTACKS = {"fog": fog, "gabor": gabor, "snow": snow,
           **{f"jpeg_{norm}": functools.partial(jpeg, norm=norm) for norm in ("linf", "l2", "l1")}}


def attack(name: str, model: nn.Module, x: Tensor, target: Tensor, *, rng: np.random.Generator,
           eps: float | None = None, iterations: int = ITERATIONS) -> Tensor:
    """Run one of `ATTACKS`.

    Args:
        model: pixels in [0, 1] to logits.
        x, target: float [B, 3, s, s] in [0, 1], s a multiple of 32; wrong classes int64 [B]. The attack has won where
            the prediction is not the true class, whether or not it is the target.
        rng: of the kernels and starts.
        eps: None: that of `EPSILONS`; the step is ε / √200 whatever `iterations`.

    Raises:
        ValueError: an unknown name, or images of another shape.
    """
    one_of("attack", name, ATTACKS)
    if x.shape[1] != 3 or x.shape[2] != x.shape[3] or x.shape[2] % 32:
        raise ValueError(f"these attacks take square RGB images of a side that 32 divides, not {tuple(x.shape)}")
    eps = EPSILONS[name] if eps is None else eps
    return ATTACKS[name](x, Aim(model, target, eps, eps / ITERATIONS**0.5, iterations), rng)
