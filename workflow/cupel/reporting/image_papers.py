"""Tables, figures and claims of a paper on image classifiers, from the tidy table and the cells' files."""

from pathlib import Path

import numpy as np
import pandas as pd

from cupel.cells import read_tensors
from cupel.evaluation.claims import judge_all
from cupel.files import write_text
from cupel.images import datasets, models
from cupel.images.stages import make_attack, test_subset
from cupel.reporting import figures, tables
from cupel.rng import rng


def report_paper(
    paper: str,
    scale: str,
    cells: pd.DataFrame,
    labels: dict[str, str],
    kinds: dict[str, str],
    reach: dict[str, float],
    claims: list[dict],
    reported: pd.DataFrame,
    title: str,
    out: str | Path,
) -> None:
    """Write `tables/`, `figures/` and `claims.csv` of a paper.

    Args:
        paper: key.
        scale: name.
        cells: the tidy table, of all papers.
        labels: names for people, by defence, in the order of the rows; `victim` is put first.
        kinds: pruning, tuning or removal by added parts, by defence; the ones without are in neither comparison.
        reach: how far the inner steps of a variant of IMS can move a pixel, by defence.
        claims: entries of claims.yaml.
        reported: the paper's own numbers (percent), see reported/.
        title: of the paper.
        out: folder `results/<scale>/papers/<key>`.
    """
    out = Path(out)
    labels = {"victim": "no defence", **labels}
    order = list(dict.fromkeys(labels.values()))
    own = tables.with_names(cells[(cells.paper == paper) & (cells.attack != "clean")], labels)
    table = tables.attach_reported(tables.summary(own), reported)
    write_text(out / "tables" / "cells.csv", table.drop(columns="label").to_csv(index=False))
    for dataset, model in dict.fromkeys(zip(table.dataset, table.model, strict=True)):
        part = table[(table.dataset == dataset) & (table.model == model)]
        samples = int(part.n.max())
        known = "in cells.csv." if part.reported.notna().any() else "not known."
        for budget in dict.fromkeys(part.budget[part.budget != ""]):
            chosen = part[part.budget.isin(["", budget])]
            settings = (
                f"in percent on {dataset}, {model}, budget {budget}, scale {scale}; mean over "
                f"{int(part.seeds.max())} seed(s), up to {samples} test images a cell. The paper's own numbers: {known}"
            )
            stem = f"{dataset}_{model}_{budget}"
            tables.write_table(
                tables.wide(chosen, order), out / "tables" / f"acc_asr_{stem}", f"{title}: ACC and ASR {settings}"
            )
            tables.write_table(tables.wide(chosen, order, ("ra",)), out / "tables" / f"ra_{stem}", f"{title}: RA {settings}")
            tables.write_table(
                tables.means(chosen, order),
                out / "tables" / f"means_{stem}",
                f"{title}: means over attacks and rates {settings}",
            )
            tables.write_table(
                tables.by_setting(chosen, order),
                out / "tables" / f"settings_{stem}",
                f"{title}: every setting with 95 % intervals {settings}",
                index="setting: defence",
            )
        present = [label for label in order if label in set(part.label)]
        figures.save(figures.acc_asr_scatter(part, present), out / "figures" / f"scatter_{dataset}_{model}.png")
        purified = part[part.method != "victim"].assign(kind=part.method.map(kinds))
        if purified.kind.nunique() > 1:
            figures.save(figures.families(purified), out / "figures" / f"families_{dataset}_{model}.png")
            figures.save(figures.recovery(purified), out / "figures" / f"recovery_{dataset}_{model}.png")
        sizes = {budget: size for budget, size in own.groupby("budget").clean_samples.max().items() if budget}
        if len(sizes) > 1:
            figures.save(figures.budget_curves(purified, sizes), out / "figures" / f"budgets_{dataset}_{model}.png")
        steps = purified[purified.method.isin(reach)].assign(reach=purified.method.map(reach))
        if steps.reach.nunique() > 2:
            runs = own[(own.metric == "asr") & own.method.isin(reach) & (own.dataset == dataset) & (own.model == model)]
            flips = pd.DataFrame([_flips(row) for row in runs[runs.status == "ok"].itertuples()])
            figures.save(figures.reach_curves(steps, flips.assign(reach=flips.method.map(reach))),
                         out / "figures" / f"reach_{dataset}_{model}.png")
        for metric in ("asr", "acc", "ra"):
            figures.save(figures.asr_bars(part, present, metric), out / "figures" / f"{metric}_{dataset}_{model}.png")
    histories = {}
    for row in own[own.stage == "victim"].drop_duplicates("path").itertuples():
        file = Path(row.path) / "history.csv"
        if row.status == "ok" and file.is_file():
            histories[f"{row.dataset} {row.attack} {100 * row.poison_rate:g} %, seed {row.seed}"] = pd.read_csv(file)
    if histories:
        figures.save(figures.training_curves(histories), out / "figures" / "training.png")
    verdicts = judge_all(claims, cells[cells.paper == paper], paper, scale)
    write_text(out / "claims.csv", verdicts.to_csv(index=False))


def _flips(row) -> dict:
    """How often the perturbations of an IMS run changed the victim's prediction, mean over the rounds that have any."""
    history = pd.read_csv(Path(row.path) / "history.csv")
    return {"method": row.method, "attack": row.attack, "flips": history.get("flip_rate", pd.Series(dtype=float)).mean()}


def contact_sheet(dataset: str, data: str, attacks: dict[str, tuple[dict, str]], out: str | Path, count: int = 10) -> None:
    """Draw clean test images beside the stamped ones of every attack.

    Args:
        dataset: name.
        data: folder of prepared data sets.
        attacks: name to (attack spec, path of the victim's trigger.npz).
        out: picture file.
        count: images, one per class in turn.
    """
    test = datasets.load(f"{data}/{dataset}", "test")
    chosen = [int(np.flatnonzero(test.labels == c % len(test.classes))[0]) for c in range(1, count + 1)]
    clean = np.asarray(test.images[chosen])
    stamped = {}
    for name, (spec, trigger) in attacks.items():
        tensors = read_tensors(trigger)
        if "failed" in tensors:  # its victims are failed cells, with this reason, in the tables
            print(f"{name} is left out: {tensors['failed']}")
            continue
        stamped[name] = make_attack(spec, tensors).stamp(clean)
    figures.save(figures.contact_sheet(clean, stamped), out)


def feature_maps(
    panels: list[dict],
    data: str,
    dataset: str,
    target: int,
    test_size: int | None,
    out: dict,
    clean_count: int = 300,
    triggered_count: int = 100,
) -> None:
    """t-SNE maps of penultimate features, and how entangled triggered images are with the target class.

    Args:
        panels: dicts with row, title, model (path), trigger (path), attack (spec).
        data, dataset: where the test images are.
        target: the target label.
        test_size: part of the test set that the cells were measured on.
        out: paths `figure` and `table`.
    """
    from cupel.evaluation.features import entanglement, penultimate, project

    test = test_subset(datasets.load(f"{data}/{dataset}", "test"), test_size)
    stream = rng(0, "features", dataset)
    clean = test.take(np.sort(stream.permutation(len(test))[:clean_count]))
    others = np.flatnonzero(test.labels != target)
    sources = test.take(np.sort(stream.permutation(others)[:triggered_count]))
    drawn, rows = [], []
    for panel in panels:
        try:
            model = models.load(panel["model"])
        except models.NotACheckpoint as error:  # a failed cell has no network to look into
            print(f"{panel['row']}, {panel['title']}: {error}")
            continue
        stamped = make_attack(panel["attack"], read_tensors(panel["trigger"])).stamp(sources.images)
        features = [penultimate(model, images) for images in (clean.images, stamped)]
        share = entanglement(features[0], clean.labels, features[1], sources.labels, target)
        rows.append({"row": panel["row"], "model": panel["title"], **share})
        labels = np.concatenate([clean.labels, np.full(len(sources), -1)])
        drawn.append(
            {
                "row": panel["row"],
                "title": panel["title"],
                "points": project(np.concatenate(features)),
                "labels": labels,
                "note": f"near triggered: {100 * share['target']:.0f} % target, {100 * share['true']:.0f} % true",
            }
        )
    write_text(out["table"], pd.DataFrame(rows, columns=["row", "model", "target", "true"]).to_csv(index=False))
    figures.save(figures.feature_panels(drawn, test.classes, target), out["figure"])
