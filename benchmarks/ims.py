"""Cost and result of IMS against a plain implementation of its formulas, in one process.

    python benchmarks/ims.py [--width 16] [--stem-stride 1] [--images 20] [--rounds 10 20] [--seeds 2] [--threads 1]

The plain way scales the outputs of the convolutions in hooks and leaves the network as it is. Both purify the same victims,
trained for a moment on patterns with noise; with `--model`, that checkpoint. Masks and losses must be the same up to rounding.
AdamW moves an entry by the same step whatever its gradient, so where a gradient is nothing but rounding, two right programs
part. How far is what the plain way in float64 shows: the columns `ours`, `bf16` and `plain` are distances from it; `bf16` is
ours with perturbations sought in bf16, as on machines that multiply it.

Time is CPU time on the CPU (so other programs on the machine matter little) and wall time on a GPU. The last line is JSON.
Ratios are the result; absolute figures depend on the machine.
"""

import argparse
import copy
import functools
import json
import math
import statistics
import time

import numpy as np
import torch
from torch import nn

from cupel.images import models
from cupel.images.defences import Budget, purify
from cupel.rng import rng, torch_rng
from cupel.training.engine import Recipe, fit

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


def plain(victim, images: np.ndarray, stream: np.random.Generator, rounds: tuple[int, int]) -> tuple[dict, list[float]]:
    """IMS as in ims SPEC 2, released settings: masks a, s, m [N] and the loss of every round."""
    kind = {"device": next(victim.parameters()).device, "dtype": next(victim.parameters()).dtype}
    masked, reference = (copy.deepcopy(victim).eval().requires_grad_(False) for _ in range(2))
    convolutions = [module for module in masked.modules() if isinstance(module, nn.Conv2d)]
    sizes, scale = [module.out_channels for module in convolutions], {}
    for number, module in enumerate(convolutions):
        module.register_forward_hook(lambda _, __, output, n=number: output * scale["now"].split(sizes)[n][:, None, None])

    def network(mask, x):
        scale["now"] = mask
        return masked(x)

    def same(u, v):
        return (u.softmax(1) * v.softmax(1)).sum(1)

    def agree(u, v):
        return -torch.log(same(u, v) + 1e-8).mean()

    def disagree(u, v):
        return -torch.log(1 - same(u, v) + 1e-8).mean()

    def mask(u, s):
        g = 1 / (1 + torch.exp(-20 * (u - 0.5)))
        return g + s * (1 - g)

    a, s = (torch.ones(sum(sizes), **kind, requires_grad=True) for _ in range(2))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(**kind) / 255
    order, losses = torch_rng(int(stream.integers(2**62)), "order"), []
    for stage, (most, weight) in enumerate(((rounds[0], 10), (rounds[1], 0), (rounds[1], 10))):
        optimizer, best, waited = torch.optim.AdamW([a, s], 0.02), math.inf, 0
        for _ in range(most):
            x = pixels[torch.randperm(len(pixels), generator=order)[:256].to(pixels.device)]
            y = reference(x)
            if stage:
                delta, inverse = torch.zeros_like(x, requires_grad=True), mask(1 - a, s).detach()
                inner = torch.optim.AdamW([delta], 0.001)
                for _ in range(20):
                    inner.zero_grad()
                    answer = reference(x + delta)
                    (agree(network(inverse, x + delta), answer) + disagree(answer, y)).backward()
                    inner.step()
                z = (x + delta).detach()
            loss = weight * (1 - s).abs().mean() + agree(network(mask(a, s), x), y) + disagree(network(mask(1 - a, s), x), y)
            if stage:
                out = network(mask(1 - a, s), z)
                loss = loss + agree(network(mask(a, s), z), y) + agree(out, reference(z)) + disagree(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                a.clamp_(0, 1)
                s.clamp_(0, 1)
            losses.append(loss.item())
            best, waited = (losses[-1], 0) if losses[-1] < 0.98 * best else (best, waited + 1)
            if waited > 25:
                break
    return {kind: t.detach().cpu().numpy() for kind, t in (("a", a), ("s", s), ("m", mask(a, s)))}, losses


def ours(victim, images: np.ndarray, stream: np.random.Generator, rounds: tuple[int, int],
         precision: str = "fp32") -> tuple[dict, list[float]]:
    """The same of the library."""
    budget = Budget(images, np.zeros(len(images), np.int64), 10, device=str(next(victim.parameters()).device),
                    precision=precision)
    _, history = purify("ims", victim, budget, stream, rounds_initial=rounds[0], rounds_minimise=rounds[1])
    masks = {kind: np.concatenate([v for name, v in budget.details.items() if name[0] == kind]) for kind in "asm"}
    return masks, [row["loss"] for row in history]


def made(width: int, stem_stride: int, seed: int, device: str):
    """A victim that knows ten patterns, and their images."""
    draw = np.random.default_rng(seed)
    labels = np.arange(1000) % 10
    patterns = np.kron(draw.uniform(60, 190, (10, 4, 4, 3)), np.ones((1, 8, 8, 1)))
    images = (patterns[labels] + draw.normal(0, 60, (1000, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    victim = models.build("resnet18", num_classes=10, width=width, stem_stride=stem_stride, mean=MEAN, std=STD, seed=seed)
    fit(victim, images, labels, Recipe(epochs=2, lr=0.05, crop=0, flip=False), seed=seed, device=device)
    return victim, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint of a victim of 32x32 images")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--stem-stride", type=int, default=1)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--rounds", type=int, nargs=2, default=(10, 20), help="of stage I, and of II and III each")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    rows = []
    for seed in range(options.seeds):
        victim, images = made(options.width, options.stem_stride, seed, options.device)
        if options.model:
            victim = models.load(options.model).to(options.device)
        arguments = images[: options.images], rng(seed, "ims"), tuple(options.rounds)
        wanted, losses = plain(copy.deepcopy(victim).double(), *arguments)
        row = {"seed": seed, "rounds": len(losses), "pruned": float((wanted["m"] < 0.5).mean())}
        for name, way in (("ours", ours), ("bf16", functools.partial(ours, precision="bf16")), ("plain", plain)):
            begun = clock()
            masks, found = way(victim.eval(), images[: options.images], rng(seed, "ims"), tuple(options.rounds))
            row[f"{name}_seconds"] = clock() - begun
            row[f"{name}_rounds"], both = len(found), min(len(found), len(losses))
            row[f"{name}_loss"] = float(np.abs(np.subtract(found[:both], losses[:both])).mean())
            row |= {f"{name}_mask_{kind}": float(np.abs(masks[kind] - wanted[kind]).mean()) for kind in masks}
        rows.append(row | {f"{name}_ratio": row["plain_seconds"] / row[f"{name}_seconds"] for name in ("ours", "bf16")})
        print(", ".join(f"{key} {value:.3g}" for key, value in rows[-1].items()), flush=True)
    print(json.dumps({**vars(options), "torch": torch.__version__, "runs": rows, **{
        name: statistics.median(row[name] for row in rows) for name in ("ours_ratio", "bf16_ratio")}}))


if __name__ == "__main__":
    main()
