"""What can be seen of a backdoor without its trigger: evidence, not a verdict.

Each of the three methods finds something in a clean network too, and each is blind to some backdoors. The numbers of
optimisation steps are smaller than published: made for a first look on a machine without a GPU.
"""

import sys
from dataclasses import replace

import numpy as np
import torch

from cupel.images.defences import Budget
from cupel.images.defences.bti_dbf import bti_dbf
from cupel.images.defences.nc import anomaly_index, search
from cupel.rng import derive, rng, torch_rng
from cupel.training.progress import Progress

IMAGES = 128


def neural_cleanse(model, budget: Budget, seed: int) -> dict:
    """Smallest trigger of every class, by the search of `cupel.images.defences.nc`.

    Returns:
        `rows`, one a class: norm of its mask (in pixels), anomaly index, whether one was found, and whether it is flagged
        (index above 2 and smaller than the median); `class` with the smallest trigger, of those found if any was; its `mask`
        float [H, W, 1] and `pattern` float [H, W, C] in [0, 1].
    """
    print(f"evidence: the smallest trigger of each of {budget.classes} classes is sought (Neural Cleanse)", file=sys.stderr)
    few = budget.take(rng(seed, "own", "nc").permutation(len(budget))[:IMAGES])
    found = search(model, replace(few, checkpoint=None), derive(seed, "own", "nc"), epochs=60, lr=0.1, batch_size=32,
                   together=10, cost=1e-3, up=2.0, patience=5, success=0.98, stop_patience=25)
    norms = found.mask.double().flatten(1).sum(1).cpu().numpy()
    index = anomaly_index(norms)
    rows = [{"class": k, "mask_norm": float(norms[k]), "anomaly_index": float(index[k]),
             "found": bool(np.isfinite(found.best[k])), "flagged": bool(index[k] > 2 and norms[k] <= np.median(norms))}
            for k in range(len(norms))]
    smallest = min(rows, key=lambda row: (not row["found"], row["mask_norm"]))["class"]
    mask, pattern = (tensor[smallest].permute(1, 2, 0).cpu().numpy() for tensor in (found.mask, found.pattern))
    return {"rows": rows, "class": smallest, "mask": mask, "pattern": pattern}


def stamped(images: np.ndarray, mask: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Images uint8 [N, H, W, C] with a trigger of mask [H, W, 1] and pattern [H, W, C]."""
    return ((1 - mask) * images + mask * pattern * 255).round().clip(0, 255).astype(np.uint8)


def margins(model, budget: Budget, seed: int, *, starts: int = 10, steps: int = 100, lr: float = 0.05) -> dict:
    """Largest margins of logits, over images that need not look like anything (MM-BD, Wang et al., IEEE S&P 2024).

    For every class the margin over all other classes is raised by Adam from uniform noise in [0, 1]. A backdoor makes that of
    its target stand out. The p value is that of the largest under a gamma distribution fitted to the others.

    Returns:
        `rows`, one a class; `class` of the largest margin; `p`, None with fewer than four classes.
    """
    from scipy.stats import gamma

    generator, (height, width, channels) = torch_rng(seed, "own", "margins"), budget.images.shape[1:]
    model.eval()
    rows, progress = [], Progress("evidence, MM-BD", budget.classes * steps, unit="steps")
    for k in range(budget.classes):
        x = torch.rand(starts, channels, height, width, generator=generator).to(budget.device).requires_grad_()
        optimizer = torch.optim.Adam([x], lr)
        for _ in range(steps):
            logits = model(x)
            others = logits.clone()
            others[:, k] = -torch.inf
            margin = logits[:, k] - others.amax(1)
            x.grad = torch.autograd.grad(-margin.sum(), x)[0]
            optimizer.step()
            with torch.no_grad():
                x.clamp_(0, 1)
            progress(1, f"class {k}")
        rows.append({"class": k, "margin": margin.detach().max().item()})
    progress.close()
    values = np.array([row["margin"] for row in rows])
    found = {"rows": rows, "class": int(values.argmax()), "p": None}
    if len(values) >= 4:
        rest = np.delete(values, values.argmax())
        shift = min(0.0, float(rest.min())) - 1e-6
        shape, place, scale = gamma.fit(rest - shift, floc=0)
        found["p"] = float(1 - gamma.cdf(values.max() - shift, shape, place, scale) ** len(values))
    return found


def decoupled(model, budget: Budget, seed: int) -> dict:
    """The `class` into which BTI-DBF's generator sends most images, after one round without unlearning; there always is one."""
    print("evidence: a generator of trigger images is trained (BTI-DBF)", file=sys.stderr)
    few = budget.take(rng(seed, "own", "bti_dbf").permutation(len(budget))[: 2 * IMAGES])
    _, history = bti_dbf(model, replace(few, checkpoint=None), rng(seed, "own", "bti_dbf"), rounds=1, pretrain_epochs=20,
                         mask_epochs=10, generator_epochs=20, unlearn_epochs=0, generator_width=16, batch_size=32)
    return {"class": int(history[-1]["detected_class"])}


#: by name, cheapest first: what each finds of a network, with the defender's data and a seed, as plain values
METHODS = {"mm_bd": margins, "nc": neural_cleanse, "bti_dbf": decoupled}

