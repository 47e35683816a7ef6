"""Cost of a training step for robust interpretation, beside the same step with the last convolution computed whole, in one run.

    python benchmarks/robust_step.py [--methods adv int ...] [--steps 5] [--rounds 5] [--threads 1]

MNIST Small, batches of 50 random images, `desk`'s 5 inner steps, fp32. Logits and maps are linear in what the last convolution
sees, so Cupel computes only their part of it (`cupel.robust.models`); the plain way computes A [B, 100, 7, 7] and takes the
mean and the maps of it. Rounds alternate, medians are reported. Absolute figures depend on the machine. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import torch

from cupel.robust.models import NETWORKS, Chain, GapClassifier, build, initialise
from cupel.robust.objectives import METHODS, Objective, Ramp


class Whole(Chain):
    """Small, whose last convolution is like the others."""

    last = None


def plain() -> GapClassifier:
    """Small with the same initial weights, computed the plain way."""
    extractor = NETWORKS["small"](1)
    extractor.__class__ = Whole
    return initialise(GapClassifier(extractor, 10))


def seconds(network: GapClassifier, method: str, steps: int) -> float:
    """CPU time of a step: search, loss, gradient, update."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(50, 1, 28, 28, generator=draw), torch.randint(10, (50,), generator=draw)
    objective = Objective(method, ramp=Ramp(0.3, -1, -1), inner_steps=5, step_size=0.1, steps_per_epoch=1, seed=0)
    objective.epoch(0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
    begun = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        objective(network, x, y)[0].backward()
        optimizer.step()
    return (time.process_time() - begun) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["normal", "adv", "trades", "int", "int2"], choices=tuple(METHODS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = {name: network.to(memory_format=torch.channels_last)
            for name, network in (("plain", plain()), ("cupel", build("small", in_channels=1)))}
    found = {}
    for method in options.methods:
        times = {name: [] for name in ways}
        for _ in range(options.rounds + 1):
            for name, network in ways.items():
                times[name].append(seconds(network, method, options.steps))
        median = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
        found[method] = {**median, "ratio": median["plain"] / median["cupel"]}
        print(f"{method:8} plain {1000 * median['plain']:6.1f} ms, Cupel {1000 * median['cupel']:6.1f} ms, "
              f"ratio {found[method]['ratio']:.1f}")
    print(json.dumps({"torch": torch.__version__, "threads": options.threads, "seconds": found}))


if __name__ == "__main__":
    main()
