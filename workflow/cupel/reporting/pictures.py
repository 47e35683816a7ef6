"""Pictures that look into images and networks: what triggers do to images, and where features of triggered images lie."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.cells import failure, read_tensors
from cupel.files import write_text
from cupel.images import datasets, models
from cupel.images.attacks.base import changed
from cupel.images.datasets.splits import test_subset
from cupel.images.stages import make_attack
from cupel.reporting.figures import amplified, handle, nothing, panels, picture_rows, save, styles
from cupel.rng import rng


def contact_sheet(folder: str, attacks: dict[str, tuple[dict, str | None]], out: Mapping[str, str | Path],
                  count: int = 10) -> None:
    """Draw clean test images, and for each attack the stamped ones and the difference, amplified: all attacks on one sheet, and
    the first images for each attack alone.

    Args:
        folder: of the prepared data set.
        attacks: name to (attack spec, path of a victim's trigger.npz; none for a trigger that is a formula).
        out: paths `sheet`, a picture, and `pictures`, a folder of one by name of each attack.
        count: images, one per class in turn.
    """
    test = datasets.load(folder, "test")
    chosen = [int(np.flatnonzero(test.labels == c % len(test.classes))[0]) for c in range(1, count + 1)]
    clean = np.asarray(test.images[chosen])
    rows = [("clean", clean)]
    Path(out["pictures"]).mkdir(parents=True, exist_ok=True)
    for name, (spec, trigger) in attacks.items():
        if (stamped := stamped_or_none(name, spec, trigger, clean)) is None:
            continue
        difference, factor = amplified(stamped, clean)
        pair = [(name, stamped), (f"difference ×{factor}", difference)]
        rows += pair
        alone = [(title, images[:5]) for title, images in (rows[0], *pair)]
        save(picture_rows(alone, 1.02, 1.05)[0], Path(out["pictures"]) / f"{name}.png")
    save(picture_rows(rows, 1.02, 1.05)[0], out["sheet"])


def stamped_or_none(name: str, spec: dict, trigger: str | None, images: np.ndarray) -> np.ndarray | None:
    """Stamped images, uint8 [N, H, W, C]; None where the attack fails: its victims are failed cells with that reason."""
    try:
        return changed(images, make_attack(spec, read_tensors(trigger)).stamp(images))
    except Exception as error:
        print(f"{name} is left out: {failure(error)}")
        return None


def feature_maps(spec: dict, folder: str, out: dict, clean_count: int = 300, triggered_count: int = 100) -> None:
    """t-SNE maps of penultimate features, and how entangled triggered images are with the target class.

    Args:
        spec: `panels` (dicts with row, title, model and trigger (paths), attack (spec)), `target` (the label) and
            `test_size`: part of the test set that the cells were measured on.
        folder: of the prepared data set.
        out: paths `figure` and `table`.
    """
    from cupel.evaluation.features import entanglement, penultimate, project

    test, target = test_subset(datasets.load(folder, "test"), spec["test_size"]), spec["target"]
    stream = rng(0, "features", Path(folder).name)
    clean = test.take(np.sort(stream.permutation(len(test))[:clean_count]))
    others = np.flatnonzero(test.labels != target)
    sources = test.take(np.sort(stream.permutation(others)[:triggered_count]))
    labels = np.concatenate([clean.labels, np.full(len(sources), -1)])
    drawn, rows = [], []
    for panel in spec["panels"]:
        try:
            model = models.load(panel["model"])
        except models.NotACheckpoint as error:  # a failed cell has no network to look into
            print(f"{panel['row']}, {panel['title']}: {error}")
            continue
        if (stamped := stamped_or_none(panel["row"], panel["attack"], panel["trigger"], sources.images)) is None:
            continue
        features = [penultimate(model, images) for images in (clean.images, stamped)]
        share = entanglement(features[0], clean.labels, features[1], sources.labels, target)
        rows.append({"row": panel["row"], "model": panel["title"], **share})
        drawn.append({**panel, "points": project(np.concatenate(features)), "labels": labels,
                      "note": f"near triggered: {100 * share['target']:.0f} % target, {100 * share['true']:.0f} % true"})
    write_text(out["table"], pd.DataFrame(rows, columns=["row", "model", "target", "true"]).to_csv(index=False))
    save(feature_panels(drawn, test.classes, target) if drawn else nothing("no network to look into"), out["figure"])


def feature_panels(drawn: list[dict], classes: tuple[str, ...], target: int):
    """Two-dimensional maps of penultimate features: clean test images by class, triggered ones as black crosses.

    Args:
        drawn: dicts with title, points float [N, 2], labels int [N] (−1: triggered), row, note.
    """
    rows = pd.DataFrame(drawn).groupby("row", sort=False)
    columns = rows.size().max()
    figure, axes = panels(rows.ngroups * columns, columns, 2.9, 3.1)
    looks = list(styles(classes).values())
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        axis.axis("off")
    for line, (row, part) in zip(axes, rows, strict=True):
        for axis, panel in zip(line, part.itertuples(), strict=False):
            axis.axis("on")
            for c, (colour, mark) in enumerate(looks):
                axis.scatter(*panel.points[panel.labels == c].T, s=9 if c != target else 16, alpha=0.75, lw=0, color=colour,
                             marker=mark)
            axis.scatter(*panel.points[panel.labels == -1].T, s=7, color="black", marker="x", lw=0.6)
            axis.set_title(f"{row}: {panel.title}\n{panel.note}", fontsize=8)
    handles = [handle(name + (" (target)" if c == target else ""), ls="", marker=looks[c][1], color=looks[c][0])
               for c, name in enumerate(classes[:10])]
    handles.append(handle("triggered", ls="", marker="x", color="black"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    return figure
