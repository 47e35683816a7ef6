"""One run of IMS, looked into: masks and selections by layer, its stages, and the perturbations it synthesises."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cupel.cells import read_tensors
from cupel.files import read_json
from cupel.images import datasets, models
from cupel.images.defences.base import defence
from cupel.images.defences.ims import Settings, inverse_mask, perturb
from cupel.images.stages import clean_budget, make_attack
from cupel.reporting.figures import COLOURS, nothing, picture_rows, plt, save, with_numbers
from cupel.reporting.paper import history
from cupel.training.augment import to_pixels


def draw(run: dict, inputs: Mapping[str, str], out: Mapping[str, str], device: str) -> None:
    """Draw what the run kept, and the perturbations at its last masks.

    Args:
        run: `spec` and `defence` as in `cupel.images.stages.purify`, and `data`: folder of data sets.
        inputs: paths `victim`, `trigger` and `metrics`, which has history.csv and details.npz beside it.
        out: paths `masks` and `gallery` of the pictures, which have their numbers as CSV beside them.
        device: where to compute.
    """
    folder, record = Path(inputs["metrics"]).parent, read_json(inputs["metrics"])
    past = history(folder)
    if record["status"] != "ok":
        why = pd.DataFrame({"failed": [record["reason"]]})
        for picture in ("masks", "gallery"):
            save(with_numbers(nothing(f"failed: {record['reason']}"), why), out[picture])
        return
    kept = {}
    for name, values in read_tensors(folder / "details.npz").items():
        kind, _, layer = name.partition(":")
        kept.setdefault(layer, {})[kind] = torch.from_numpy(values)
    save(masks_figure(kept, past), out["masks"])

    train = datasets.load(f"{run['data']}/{run['spec']['dataset']}", "train")
    clean = np.asarray(train.images[clean_budget(train, run["spec"], run["defence"]["budget"])])
    images = clean[np.linspace(0, len(clean) - 1, 8).astype(int)]
    delta, before, after = perturbations(models.load(inputs["victim"]).to(device).eval(), kept, images,
                                         run["defence"]["settings"])
    notes = [f"{train.classes[a]} → {train.classes[b]}" for a, b in zip(before, after, strict=True)]
    attack = make_attack(run["spec"]["attack"], read_tensors(inputs["trigger"]))
    stamped = attack.stamp(images) if attack else images  # a clean victim has no trigger
    figure = gallery(images / 255, delta, stamped / 255, notes)
    save(with_numbers(figure, pd.DataFrame({
        "picture": range(len(images)), "before": [train.classes[k] for k in before], "after": [train.classes[k] for k in after],
        "largest_change": np.abs(delta).max((1, 2, 3)), "mean_change": np.abs(delta).mean((1, 2, 3)),
        "largest_change_of_trigger": np.abs(stamped / 255 - images / 255).max((1, 2, 3))})), out["gallery"])


def perturbations(network, kept: Mapping[str, Mapping], images: np.ndarray, settings: dict) -> tuple:
    """What the inner problem adds to images [N, H, W, C] at the last masks: δ as float [N, H, W, C], and the network's
    predictions before and after, int [N] each."""
    device = next(network.parameters()).device
    x, settings = to_pixels(torch.from_numpy(images)).to(device), Settings(**defence.settings("ims", settings))
    tensors = {}
    for name, masks in kept.items():
        convolution = network.get_submodule(name)
        scale = inverse_mask(masks["a"], masks["s"], settings.temperature).to(device)
        tensors[f"{name}.weight"] = convolution.weight.detach() * scale.view(-1, 1, 1, 1)
        if convolution.bias is not None:
            tensors[f"{name}.bias"] = convolution.bias.detach() * scale
    network.requires_grad_(False)
    clean = network(x)
    delta, _ = perturb(network, lambda z: torch.func.functional_call(network, tensors, (z,)), x, clean, settings)
    return delta.permute(0, 2, 3, 1).cpu().numpy(), clean.argmax(1).tolist(), network(x + delta).argmax(1).tolist()


def masks_figure(kept: Mapping[str, Mapping], past: pd.DataFrame):
    """Shares per layer and the course of the stages; its numbers are quartiles by layer, and shares by round.

    Args:
        kept: by layer `a`, `s` and `m`, each float [C].
        past: rows of the history of `cupel.images.defences.ims`.
    """
    figure, axes = plt.subplots(3, 1, figsize=(9.5, 8.4), layout="constrained")
    places = np.arange(len(kept))
    for axis, kind, title in zip(axes, "ms", ("forward mask m (0: pruned)", "selection s (1: shared by both networks)"),
                                 strict=False):
        axis.boxplot([masks[kind].numpy() for masks in kept.values()], positions=places, widths=0.6,
                     flierprops={"marker": ".", "markersize": 3, "markeredgecolor": COLOURS[6]},
                     medianprops={"color": COLOURS[5]})
        names = [] if kind == "m" else [name.removeprefix("extractor.") for name in kept]
        axis.set(title=title, ylim=(-0.03, 1.03), xticks=places)
        axis.set_xticklabels(names, rotation=60, ha="right", fontsize=7)
    rounds = np.arange(1, len(past) + 1)
    for column, colour, label in (("flip_rate", COLOURS[6], "flip rate of the perturbations"),
                                  ("selected", COLOURS[5], "selected (s < ½)"), ("pruned", COLOURS[3], "pruned (m < ½)")):
        if column in past:
            axes[2].plot(rounds, past[column], color=colour, label=label)
        else:
            axes[2].plot([], [], color=colour, label=f"{label}: not recorded")
    for stage, part in past.groupby("stage", sort=False):
        axes[2].axvline(part.index[0] + 0.5, color="grey", lw=0.6)
        axes[2].text(part.index[0] + 0.8, 1.0, f"stage {stage}", fontsize=8, color="grey")
    axes[2].set(xlabel="round", ylabel="share", ylim=(-0.03, 1.1))
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    points = [{"panel": kind, "place": name, "series": f"quantile {share:g}", "value": np.quantile(masks[kind].numpy(), share)}
              for kind in "ms" for name, masks in kept.items() for share in (0, 0.25, 0.5, 0.75, 1)]
    shares = past.assign(place=rounds).melt(["place", "stage"], past.columns.intersection(["flip_rate", "selected", "pruned"]),
                                            "series").assign(panel="rounds")
    return with_numbers(figure, pd.concat([pd.DataFrame(points), shares]))


def gallery(clean: np.ndarray, delta: np.ndarray, stamped: np.ndarray, notes: list[str]):
    """Images [N, H, W, C] in [0, 1], their perturbations (amplified to their largest value), and the real trigger."""
    largest = max(np.abs(delta).max(), 1e-9)
    rows = (("clean", clean), (f"δ, ×{0.5 / largest:.0f}", 0.5 + delta / largest / 2), ("real trigger", stamped))
    figure, axes = picture_rows([(title, np.clip(images, 0, 1)) for title, images in rows], 1.15, 1.33)
    for axis, note in zip(axes[1], notes, strict=True):
        axis.set_title(note, fontsize=7)
    return figure
