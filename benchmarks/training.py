"""Images per second of victim training and of testing: the engine in fp32 and bf16 against a plain PyTorch loop, in one run.

    python benchmarks/training.py [--width 64] [--steps 12] [--threads 2] [--device cpu]

The plain loop is what a newcomer to the field meets: fp32, a DataLoader, torchvision transforms per image. Ratios are
the result; absolute figures depend on the machine. Rounds alternate, medians are reported. How much is left: the operations of
the convolutions and products (forward; three times that in training) against what this machine does in a product of two square
matrices of the same type. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from cupel.compat import ensure_torchvision
from cupel.images import datasets, models
from cupel.training.engine import Recipe, fit, predict
from cupel.training.precision import settled

BATCH = 128


class PerImage(Dataset):
    """Images that are transformed one by one."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int):
        return self.transform(self.images[k]), int(self.labels[k])


def plain_training(model, loader, device: str) -> None:
    """One pass: forward, backward, SGD step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    model.train()
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


@torch.no_grad()
def plain_testing(model, loader, device: str) -> None:
    """One pass of predictions."""
    model.eval()
    for x, _ in loader:
        model(x.to(device)).argmax(1).cpu()


def timed(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ceiling(dtype: torch.dtype, device: str, side: int = 2048) -> float:
    """FLOP/s of a product of two square matrices, the best of five."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, device) for _ in range(5))


def operations(model, device: str) -> int:
    """FLOP of one image, forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32, device=device))
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--data", default="data/images/cifar10")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ensure_torchvision()
    from torchvision.transforms import v2

    train = datasets.load(options.data, "train")
    count = BATCH * options.steps
    images, labels = np.asarray(train.images[:count]), train.labels[:count]
    crop = [v2.ToImage(), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    last = [v2.ToDtype(torch.float32, scale=True)]
    workers = 0 if options.device == "cpu" else 8
    loaders = [DataLoader(PerImage(images, labels, v2.Compose([*first, *last])), BATCH, shuffle=True, num_workers=workers)
               for first in (crop, [v2.ToImage()])]

    def network():
        return models.build("preactresnet18", num_classes=10, width=options.width, seed=0).to(options.device)

    def training(precision, model):
        recipe = Recipe(epochs=1, lr=0.01, precision=precision, compile=options.compile)
        return lambda: fit(model, images, labels, recipe, seed=0, device=options.device)

    def testing(precision, model):
        return lambda: predict(model, images, device=options.device, precision=precision)

    trained, tested = network(), network()
    runs = {
        "training": {"plain loop": lambda: plain_training(trained, loaders[0], options.device),
                     **{f"engine, {precision}": training(precision, network()) for precision in ("fp32", "bf16")}},
        "testing": {"plain loop": lambda: plain_testing(tested, loaders[1], options.device),
                    **{f"engine, {precision}": testing(precision, network()) for precision in ("fp32", "bf16")}},
    }
    print(f"PreActResNet-18, width {options.width}, batch {BATCH}, {options.device}, {options.threads} threads, "
          f"torch {torch.__version__}, median of {options.rounds} alternating rounds of {count} images; "
          f"precision auto would be {settled({'precision': 'auto'}, options.device)['precision']}")
    most = {dtype: ceiling(dtype, options.device) for dtype in (torch.float32, torch.bfloat16)}
    one, rows = operations(network(), options.device), []
    for name, rivals in runs.items():
        for function in rivals.values():
            function()
        seconds = [[timed(function, options.device) for function in rivals.values()] for _ in range(options.rounds)]
        rates = [count / statistics.median(column) for column in zip(*seconds, strict=True)]
        for rival, rate in zip(rivals, rates, strict=True):
            flops = rate * one * (3 if name == "training" else 1)
            share = flops / most[torch.bfloat16 if "bf16" in rival else torch.float32]
            rows.append({"what": name, "way": rival, "images/s": rate, "ratio": rate / rates[0], "GFLOP/s": flops / 1e9,
                         "share of ceiling": share})
            print(f"{name}: {rival} {rate:,.0f} images/s, ratio {rate / rates[0]:.1f}, {flops / 1e9:.0f} GFLOP/s, "
                  f"{share:.0%} of the ceiling")
    print(json.dumps({**vars(options), "torch": torch.__version__, "rows": rows,
                      "ceilings": {str(dtype): flops for dtype, flops in most.items()}}))


if __name__ == "__main__":
    main()
