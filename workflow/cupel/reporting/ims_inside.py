"""One run of IMS, looked into: masks and selections by layer, its stages, and the perturbations it synthesises."""

import numpy as np
import pandas as pd
import torch

from cupel.cells import read_tensors
from cupel.images import datasets, models
from cupel.images.defences import Budget
from cupel.images.defences.ims import inverse_mask, perturb, purify_with_masks
from cupel.images.stages import clean_budget, make_attack
from cupel.reporting.figures import COLOURS, plt, save
from cupel.rng import rng
from cupel.training.augment import to_pixels


def masks_figure(masks: dict[str, tuple], history: pd.DataFrame):
    """Shares per layer and the course of the stages.

    Args:
        masks: layer name to (a, s, m), each float [C].
        history: rows of `cupel.images.defences.ims`.
    """
    figure, axes = plt.subplots(3, 1, figsize=(9.5, 8.4), layout="constrained")
    places = np.arange(len(masks))
    for axis, index, title in (
        (axes[0], 2, "forward mask m (0: pruned)"),
        (axes[1], 1, "selection s (1: shared by both networks)"),
    ):
        axis.boxplot(
            [layer[index].numpy() for layer in masks.values()],
            positions=places,
            widths=0.6,
            flierprops={"marker": ".", "markersize": 3, "markeredgecolor": COLOURS[6]},
            medianprops={"color": COLOURS[5]},
        )
        axis.set(title=title, ylim=(-0.03, 1.03), xticks=places)
        axis.set_xticklabels(
            [] if index == 2 else [name.removeprefix("extractor.") for name in masks], rotation=60, ha="right", fontsize=7
        )
    rounds = np.arange(1, len(history) + 1)
    for column, colour, label in (
        ("flip_rate", COLOURS[6], "flip rate of the perturbations"),
        ("selected", COLOURS[5], "selected (s < ½)"),
        ("pruned", COLOURS[3], "pruned (m < ½)"),
    ):
        if column in history:
            axes[2].plot(rounds, history[column], color=colour, label=label)
    for stage, part in history.groupby("stage", sort=False):
        axes[2].axvline(part.index[0] + 0.5, color="grey", lw=0.6)
        axes[2].text(part.index[0] + 0.8, 1.0, f"stage {stage}", fontsize=8, color="grey")
    axes[2].set(xlabel="round", ylabel="share", ylim=(-0.03, 1.1))
    axes[2].legend(loc="center right")
    return figure


def gallery(clean: np.ndarray, delta: np.ndarray, stamped: np.ndarray, notes: list[str]):
    """Images [N, H, W, C] in [0, 1], their perturbations (amplified to their largest value), and the real trigger."""
    figure, axes = plt.subplots(3, len(clean), figsize=(1.15 * len(clean) + 1.2, 4), squeeze=False, layout="constrained")
    largest = max(np.abs(delta).max(), 1e-9)
    rows = (("clean", clean), (f"δ, ×{0.5 / largest:.0f}", 0.5 + delta / largest / 2), ("real trigger", stamped))
    for row, (title, images) in zip(axes, rows, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(np.clip(image, 0, 1).squeeze(), cmap="gray", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    for axis, note in zip(axes[1], notes, strict=True):
        axis.set_title(note, fontsize=7)
    return figure


def look_inside(
    spec: dict, defence: dict, data: str, victim: str, trigger: str, out: dict, device: str, count: int = 8
) -> None:
    """Run IMS on a victim again and draw what the workflow does not keep.

    Args:
        spec, defence: as in `cupel.images.stages.purify`.
        data, victim, trigger: folder of data sets, checkpoint, trigger tensors.
        out: paths `masks` and `gallery` of the pictures, `table` of the history.
        device: where to compute.
        count: images in the gallery.
    """
    train = datasets.load(f"{data}/{spec['dataset']}", "train")
    chosen = clean_budget(train, spec, defence["budget"])
    budget = Budget(np.asarray(train.images[chosen]), train.labels[chosen], len(train.classes), device=device)
    network = models.load(victim).to(device).eval()
    stream = rng(spec["seed"], "defence", defence["function"], defence["budget"]["name"])
    _, history, masks = purify_with_masks(network, budget, stream, **defence["hyperparameters"])
    history = pd.DataFrame(history)
    save(masks_figure(masks, history), out["masks"])
    history.to_csv(out["table"], index=False)

    settings = {
        key: defence["hyperparameters"].get(key, default)
        for key, default in (("norm_bound", 1.0), ("lr_perturb", 0.001), ("steps_perturb", 20))
    }
    temperature = defence["hyperparameters"].get("temperature", 20.0)
    images = budget.images[np.linspace(0, len(budget) - 1, count).astype(int)]
    x = to_pixels(torch.from_numpy(images)).to(device)
    scales = {name: inverse_mask(a, s, temperature) for name, (a, s, _) in masks.items()}
    tensors = {}
    for name, scale in scales.items():
        convolution = network.get_submodule(name)
        tensors[f"{name}.weight"] = convolution.weight.detach() * scale.to(device).view(-1, 1, 1, 1)
        if convolution.bias is not None:
            tensors[f"{name}.bias"] = convolution.bias.detach() * scale.to(device)
    network.requires_grad_(False)
    clean = network(x)
    delta, _ = perturb(network, lambda z: torch.func.functional_call(network, tensors, (z,)), x, clean, **settings)
    answer = network(x + delta).argmax(1)
    notes = [
        f"{train.classes[int(before)]} → {train.classes[int(after)]}"
        for before, after in zip(clean.argmax(1), answer, strict=True)
    ]
    stamped = make_attack(spec["attack"], read_tensors(trigger)).stamp(images)
    save(gallery(images / 255, delta.permute(0, 2, 3, 1).cpu().numpy(), stamped / 255, notes), out["gallery"])
