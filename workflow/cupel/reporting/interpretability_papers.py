"""Tables, figures and claims of a paper on robust training by interpretation, from the tidy table and the cells' arrays.

A file is named by what it shows, data set and network. E1 to E12 are the experiments of proper_interpretability SPEC 8.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.cells import read_tensors
from cupel.evaluation.claims import judge_all
from cupel.files import read_json, write_json, write_text
from cupel.reporting import figures, tables
from cupel.reporting import interpretability_figures as drawn
from cupel.robust.aai import overlap
from cupel.robust.grid import fraction

MAIN = "main"
KEYS = ["dataset", "model", "recipe", "method", "label", "attack", "attack_variant", "metric"]


def settings_of(variant: str) -> dict[str, str]:
    """`eps=8/255 steps=10` as a dict of texts."""
    return dict(part.split("=", 1) for part in variant.split() if "=" in part)


def prepared(cells: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Rows of a paper with `method`, `label`, and ε and steps of the attack as text and number; values are means over seeds.

    Columns: `KEYS`, value, low, high, n (of one seed), seeds, failed, eps, eps_value, steps. A failed cell has NaN.
    """
    own = cells.copy()
    own["method"] = [row.defence + (f"~{row.variant}" if row.variant else "") for row in own.itertuples()]
    own["label"] = [labels.get(method, method) for method in own.method]
    groups = own.groupby(KEYS, dropna=False, sort=False)
    table = groups.agg(value=("value", "mean"), low=("low", "mean"), high=("high", "mean"), n=("n", "max"),
                       seeds=("seed", "nunique"), failed=("status", lambda s: int((s != "ok").sum()))).reset_index()
    named = [settings_of(variant) for variant in table.attack_variant]
    table["eps"] = [entry.get("eps", "") for entry in named]
    table["eps_value"] = [fraction(entry["eps"]) if "eps" in entry else np.nan for entry in named]
    table["steps"] = [int(entry.get("steps", 0)) for entry in named]
    return table


def most_steps(part: pd.DataFrame) -> pd.DataFrame:
    """ATA under PGD after the largest number of steps, and the clean accuracy on the same points."""
    ata = part[(part.attack == "pgd") & (part.metric == "ata")]
    return ata[(ata.steps == ata.steps.max()) | (ata.eps_value == 0)]


class Report:
    """What is written for one data set and network, under the paper's main recipe.

    Args:
        part: rows of :func:`prepared` for it.
        order: labels of the methods, in the order of the rows.
        arrays: evaluation arrays by label (of the first seed), all evaluations together.
        title: of the paper.
        name: `<dataset>_<model>`.
        scale: name.
        out: folder of the paper.
        captions: filled with the captions of the pictures.
        classes: names of the classes.
    """

    def __init__(self, part: pd.DataFrame, order: Sequence[str], arrays: dict[str, dict], *, title: str, name: str,
                 scale: str, out: Path, captions: dict[str, str], classes: Sequence[str]):
        self.part, self.arrays = part, arrays
        self.order = [label for label in order if label in set(part.label)]
        self.title, self.name, self.scale, self.out = title, name, scale, out
        self.captions, self.classes = captions, classes
        self.failed = set(part[part.failed > 0].label)
        points = part[(part.metric == "ata") & (part.attack == "pgd")].n
        self.points = int(points.max()) if len(points) else 0
        self.where = f"{name.replace('_', ' ')}, scale {scale}, {int(part.seeds.max())} seed(s)"

    def table(self, kind: str, rows: pd.DataFrame, column: Callable[[tuple], object], caption: str, *, percent: bool = True,
              digits: int = 1) -> None:
        """Write a table of methods by whatever `column` makes of a row, if there are values; failed cells say so."""
        rows = rows[rows.value.notna()].copy()
        if rows.empty:
            return
        rows["column"] = [column(row) for row in rows.itertuples()]
        rows["text"] = [f"{100 * value:.{digits}f}" if percent else f"{value:.{digits}f}" for value in rows.value]
        grid = rows.pivot_table(index="label", columns="column", values="text", aggfunc="first", sort=False)
        columns = list(dict.fromkeys(rows.column))
        if isinstance(columns[0], tuple):
            columns = pd.MultiIndex.from_tuples(columns)
        grid = grid.reindex(index=[label for label in self.order if label in grid.index or label in self.failed],
                            columns=columns)
        grid.loc[[label for label in grid.index if label in self.failed and grid.loc[label].isna().all()]] = "failed"
        tables.write_table(grid.fillna(""), self.out / "tables" / f"{kind}_{self.name}",
                           f"{self.title}: {caption} ({self.where}).", index="method")

    def figure(self, kind: str, figure, caption: str) -> None:
        """Save a picture with its caption."""
        stem = f"{kind}_{self.name}"
        figures.save(figure, self.out / "figures" / f"{stem}.png")
        self.captions[stem] = f"{caption} ({self.where})"

    def having(self, *names: str) -> dict[str, dict]:
        """Arrays of the methods that have all these names, in order."""
        return {label: self.arrays[label] for label in self.order
                if all(name in self.arrays.get(label, {}) for name in names)}

    # ----------------------------------------------------------------------------------------------- accuracy (E1, E2)

    def accuracy(self, train_eps: str) -> None:
        """ATA against ε and steps."""
        ata = self.part[(self.part.attack == "pgd") & (self.part.metric == "ata")]
        if ata.value.notna().sum() == 0:
            return
        steps, last = sorted(set(ata.steps[ata.steps > 0])), most_steps(ata).sort_values("eps_value")
        self.table("ata", last, lambda row: f"ε = {row.eps}",
                   f"accuracy in percent under {last.steps.max()}-step PGD of step 0.01 at {self.points} test points; training "
                   f"at ε = {train_eps}")
        self.table("ata_steps", ata[ata.steps > 0].sort_values(["eps_value", "steps"]),
                   lambda row: (f"ε = {row.eps}", f"{row.steps} steps"),
                   "accuracy in percent under PGD by number of steps; k steps reach no further than 0.01 k")
        ticks = dict(zip(last.eps_value, last.eps, strict=True))
        self.figure("ata", drawn.curves(last, "eps_value", self.order, xlabel="ε of the attack", ylabel="accuracy under PGD",
                                        mark=fraction(train_eps), ylim=(-0.02, 1.02), ticks=ticks),
                    f"Accuracy under {last.steps.max()}-step PGD against ε; bands are 95 % intervals of {self.points} points")
        beyond = ata[(ata.eps_value > fraction(train_eps)) & (ata.steps > 0)]
        for kind, rows in (("steps", ata[np.isclose(ata.eps_value, fraction(train_eps))]),
                           ("steps_beyond", beyond[beyond.eps_value == beyond.eps_value.max()])):
            if rows.value.notna().any() and len(steps) > 1:
                self.figure(kind, drawn.curves(rows, "steps", self.order, xlabel="steps of PGD", logarithmic=True,
                                               ylabel=f"accuracy, ε = {rows.eps.iloc[0]}", ylim=(-0.02, 1.02),
                                               ticks={count: str(count) for count in steps}),
                            f"Accuracy against the number of PGD steps at ε = {rows.eps.iloc[0]}")

    def stronger(self) -> None:
        """Random restarts and ART's attacks beside plain PGD (our addition)."""
        rows = self.part[self.part.attack.isin(["pgd_restarts", "autoattack"])]
        plain = most_steps(self.part)
        rows = pd.concat([plain[plain.eps.isin(set(rows.eps))], rows])

        def column(row) -> tuple[str, str]:
            said = settings_of(row.attack_variant)
            names = {"pgd": f"PGD, {row.steps} steps", "pgd_restarts": f"PGD, {said.get('restarts')} restarts",
                     "autoattack": f"ART to {said.get('to')}"}
            return f"ε = {row.eps}", names[row.attack]

        if (rows.attack != "pgd").any():
            self.table("stronger", rows, column, "accuracy in percent under stronger attacks (own addition); each attack of "
                       "ART takes on the points that the one before left standing")

    # -------------------------------------------------------------------------------------- interpretation (E4, E5, E6)

    def interpretation(self, train_eps: str) -> None:
        """Kendall's tau under AAI; ISA."""
        aai = self.part[(self.part.attack == "aai") & self.part.eps.ne("")].sort_values("eps_value")
        tau = aai[aai.metric == "tau"]
        if tau.value.notna().any():
            self.table("tau", tau, lambda row: f"ε = {row.eps}", "Kendall's τ between clean and attacked class activation map "
                       "(attack against interpretability, top 8), over the points that keep their prediction; empty where none "
                       "does", percent=False, digits=3)
            self.figure("tau", drawn.curves(tau, "eps_value", self.order, xlabel="ε of the attack", ylabel="Kendall's τ",
                                            mark=fraction(train_eps), ticks=dict(zip(tau.eps_value, tau.eps, strict=True))),
                        "Rank correlation of clean and attacked class activation maps under the attack against "
                        "interpretability; higher is more robust")
        isa = self.part[self.part.attack == "isa"]
        texts = {"discrepancy": "mean normalised discrepancy", "slope": "normalised slope, per point as released",
                 "slope_per_image": "normalised slope, per image"}
        for metric, text in texts.items():
            self.table(f"isa_{metric}", isa[isa.metric == metric],
                       lambda row: tuple([*row.attack_variant.split(), "all channels"][:3]),
                       f"{text} under the interpretability sneaking attack, by map, norm and classes that it counts",
                       percent=False, digits=3)
        names = [f"isa_cam_l1_{scope}_{what}" for scope in ("all", "two", "one") for what in ("discrepancy", "eps", "kept")]
        panels = {}
        for label, found in self.having(*(name for name in names if "_all_" not in name)).items():
            scopes = [scope for scope in ("all", "two", "one") if f"isa_cam_l1_{scope}_kept" in found]
            kept = np.logical_and.reduce([found[f"isa_cam_l1_{scope}_kept"] for scope in scopes])
            fall = found["isa_cam_l1_one_discrepancy"]
            usable = np.flatnonzero(kept.all(0) & np.isfinite(fall).all(0))
            if len(usable):
                panels[label] = {scope: (found[f"isa_cam_l1_{scope}_eps"][:, usable[0]],
                                         np.minimum.accumulate(found[f"isa_cam_l1_{scope}_discrepancy"][:, usable[0]]))
                                 for scope in scopes}
        if panels:
            self.figure("tradeoff", drawn.tradeoff(panels), "What the sneaking attack pays for a small discrepancy of one "
                        "image's maps, by the classes that are counted")

    # ------------------------------------------------------------------------------------------------ bound (E10), maps

    def bound(self) -> None:
        """Tightness of the lower bound."""
        panels = {}
        for label, found in self.having("bound_apart", "bound_bound", "bound_used").items():
            used = found["bound_used"]
            if used.any():
                panels[label] = found["bound_bound"][used], found["bound_apart"][used]
        if panels:
            self.figure("bound", drawn.bound_scatter(panels), "Two-class discrepancy under the targeted attack of least ε "
                        "against its lower bound: no attack can get under the dashed line")
        rows = self.part[(self.part.attack == "least_eps") & self.part.metric.isin(["bound_ratio", "least_eps"])]
        names = {"bound_ratio": "median discrepancy / bound", "least_eps": "median least ε"}
        self.table("bound", rows, lambda row: names[row.metric], "how tight the bound is, and the ε that the targeted attack "
                   "needs", percent=False, digits=3)

    def pictures(self) -> None:
        """Maps under attack (E7), overlap with the Normal net (E11), first filters and neurons (E12)."""
        found = self.having("gallery_images", "gallery_maps", "gallery_predicted")
        if found:
            # images that every network takes for what they are come first
            right = np.mean([entry["gallery_predicted"][0] == entry["gallery_classes"][:, 0] for entry in found.values()], 0)
            for number, k in enumerate(np.argsort(-right, kind="stable")[:2]):
                rows = [{"label": label, "images": entry["gallery_images"][:, k], "maps": entry["gallery_maps"][:, k],
                         "predicted": entry["gallery_predicted"][:, k], "classes": entry["gallery_classes"][k]}
                        for label, entry in found.items()]
                self.figure(f"maps{number + 1}", drawn.maps_under_attack(rows, self.classes),
                            "An image and its class activation maps before and under attack; predictions that are wrong are "
                            "red, τ compares a map with the clean one")
        normal = self.arrays.get(next((label for label in self.order if label == "Normal"), ""), {})
        rows = [{"label": label, "value": float(overlap(entry["gallery_cams"], normal["gallery_cams"]).mean())}
                for label, entry in self.having("gallery_cams").items()
                if "gallery_cams" in normal and entry["gallery_cams"].shape == normal["gallery_cams"].shape]
        if len(rows) > 1:
            self.table("overlap", pd.DataFrame(rows), lambda row: "of the top 8 cells", "overlap in percent of the eight "
                       "largest cells of the true class's map with those of the Normal net")
        weights = {label: entry["features_filters"] for label, entry in self.having("features_filters").items()}
        if weights:
            self.figure("filters", drawn.filters(weights), "Weights of the first convolution")
        reached = self.having("features_reached", "features_start")
        if reached:
            first = next(iter(reached.values()))
            self.figure("neurons", drawn.neurons(first["features_start"],
                                                 {label: entry["features_reached"] for label, entry in reached.items()},
                                                 self.classes[: len(first["features_start"])]),
                        "Inputs that maximise neurons, reached from the seed images on top; the neuron is the one that speaks "
                        "most for the class above it")

    # --------------------------------------------------------------------------------------- other attacks (E3) and cost (E8)

    def unforeseen(self) -> None:
        """Accuracy under attacks that no training has seen."""
        names = {"fog": "Fog", "gabor": "Gabor", "snow": "Snow", "jpeg_linf": "JPEG l∞", "jpeg_l2": "JPEG l2",
                 "jpeg_l1": "JPEG l1"}
        self.table("unforeseen", self.part[self.part.attack.isin(names)], lambda row: names[row.attack],
                   f"accuracy in percent under unforeseen attacks at {self.points} test points")

    def cost(self, times: pd.DataFrame, train_eps: str) -> None:
        """Seconds per epoch beside accuracy under PGD.

        Args:
            times: columns label, value; of the timing recipe where it was run, else of the main one.
        """
        ata = self.part[self.part.metric == "ata_train"].set_index("label")
        both = times.rename(columns={"value": "seconds"})[["label", "seconds"]].merge(
            ata[["value", "low", "high"]].reset_index(), on="label")
        both = both[both.label.isin(self.order) & both.value.notna()]
        if both.empty:
            return
        self.figure("time", drawn.time_against_robustness(both, self.order, train_eps),
                    "Seconds of a training epoch against accuracy under PGD at the ε of the training")
        base = both.seconds[both.label == "Normal"]
        rows = pd.concat([both.assign(value=both.seconds, kind="seconds per epoch")]
                         + ([both.assign(value=both.seconds / base.iloc[0], kind="of Normal")] if len(base) else []))
        self.table("time", rows, lambda row: row.kind, "time of a training epoch", percent=False, digits=1)


def ablation(own: pd.DataFrame, gammas: dict[str, float], train_eps: dict[str, str], dataset: str, model: str) -> pd.DataFrame:
    """Accuracy by γ and ε of the training, clean and attacked, and that of Adv (E9).

    Args:
        own: :func:`prepared`.
        gammas: γ by method, for `int` and its variants.
        train_eps: ε by recipe.
        dataset, model: which.

    Returns:
        Columns method, gamma (NaN for Adv), train_eps, kind (`clean`, `attacked`), eps, value, low, high.
    """
    part = own[(own.dataset == dataset) & (own.model == model) & (own.attack == "pgd") & (own.metric == "ata")]
    part = part[part.method.isin([*gammas, "adv"]) & part.recipe.isin(list(train_eps)) & part.value.notna()].copy()
    reference = train_eps.get(MAIN)
    part = part[(part.eps_value == 0) | ((part.eps == reference) & (part.steps == part.steps.max()))]
    part["gamma"] = [gammas.get(method, np.nan) for method in part.method]
    part["train_eps"] = [train_eps[recipe] for recipe in part.recipe]
    part["kind"] = np.where(part.eps_value == 0, "clean", "attacked")
    return part[["method", "gamma", "train_eps", "kind", "eps", "value", "low", "high"]]


def write_ablation(table: pd.DataFrame, stem: str, title: str, where: str, out: Path, captions: dict[str, str]) -> None:
    """Table and picture of the ablation, where there is more than one γ."""
    if table.gamma.nunique() < 2:
        return
    rows = table.assign(row=[f"Int, γ = {gamma:g}" if gamma == gamma else "Adv" for gamma in table.gamma],
                        column=list(zip([f"trained at ε = {eps}" for eps in table.train_eps], table.kind, strict=True)),
                        text=[f"{100 * value:.1f}" for value in table.value])
    across = rows.sort_values(["train_eps", "kind"], ascending=[True, False], key=lambda column: column.map(fraction)
                              if column.name == "train_eps" else column).column
    grid = rows.sort_values("gamma").pivot_table(index="row", columns="column", values="text", aggfunc="first", sort=False)
    grid = grid[list(dict.fromkeys(across))]
    grid.columns = pd.MultiIndex.from_tuples(list(grid.columns))
    tables.write_table(grid.fillna(""), out / "tables" / f"ablation_{stem}",
                       f"{title}: accuracy in percent by γ and ε of the training ({where}).", index="method")
    adv = table[(table.method == "adv") & (table.kind == "attacked")].set_index("train_eps").value.to_dict()
    figures.save(drawn.ablation(table[table.gamma.notna()], adv), out / "figures" / f"ablation_{stem}.png")
    captions[f"ablation_{stem}"] = f"Int by γ and ε of the training; dashed lines: Adv ({where})"


def networks_of(cells: pd.DataFrame, stage: str, labels: dict[str, str]) -> list[tuple[str, Path]]:
    """Label and folder of the cells of a stage that did not fail, those of the first seed first."""
    chosen = cells[(cells.stage == stage) & (cells.status == "ok")].drop_duplicates("path")
    names = [row.defence + (f"~{row.variant}" if row.variant else "") for row in chosen.itertuples()]
    chosen = chosen.assign(label=[labels.get(name, name) for name in names]).sort_values("seed", kind="stable")
    return [(row.label, Path(row.path)) for row in chosen.itertuples()]


def load_arrays(cells: pd.DataFrame, labels: dict[str, str]) -> dict[str, dict]:
    """Arrays of all evaluations of each network of the first seed, by label."""
    found: dict[str, dict] = {}
    for label, folder in networks_of(cells, "attacked", labels):
        file = folder / "evaluation.npz"
        for key, value in (read_tensors(file) if file.is_file() else {}).items():
            found.setdefault(label, {}).setdefault(key, value)
    return found


def histories_of(cells: pd.DataFrame, labels: dict[str, str]) -> dict[str, pd.DataFrame]:
    """Histories of the networks of the first seed, by label, in the order of the labels."""
    found = {}
    for label, folder in networks_of(cells, "trained", labels):
        if label not in found and (folder / "history.csv").is_file():
            found[label] = pd.read_csv(folder / "history.csv")
    return {label: found[label] for label in labels.values() if label in found}


def report_paper(paper: str, scale: str, cells: pd.DataFrame, labels: dict[str, str], facts: dict, claims: list[dict],
                 title: str, out: str | Path) -> None:
    """Write `tables/`, `figures/` and `claims.csv` of a paper.

    Args:
        paper: key.
        scale: name.
        cells: the tidy table, of all papers.
        labels: names for people, by method, in the order of the rows.
        facts: what the table does not say: `train_eps` (text by data set, by recipe), `gammas` (γ by method), `classes`
            (names by data set).
        claims: entries of claims.yaml.
        title: of the paper.
        out: folder `results/<scale>/papers/<key>`.
    """
    out, captions = Path(out), {}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    cells = cells[cells.paper == paper]
    own = prepared(cells, labels)
    write_text(out / "tables" / "cells.csv", own.drop(columns="label").to_csv(index=False))
    order = list(labels.values())
    for dataset, model in dict.fromkeys(zip(own.dataset, own.model, strict=True)):
        chosen = own[(own.dataset == dataset) & (own.model == model)]
        raw = cells[(cells.dataset == dataset) & (cells.model == model) & (cells.recipe == MAIN)]
        stem, train_eps = f"{dataset}_{model}", facts["train_eps"][dataset]
        part = chosen[(chosen.recipe == MAIN) & ~chosen.method.str.contains("gamma")]
        if len(part):
            report = Report(part, order, load_arrays(raw, labels), title=title, name=stem, scale=scale, out=out,
                            captions=captions, classes=facts["classes"][dataset])
            report.accuracy(train_eps[MAIN])
            report.interpretation(train_eps[MAIN])
            report.stronger()
            report.unforeseen()
            report.pictures()
            report.bound()
            times = chosen[chosen.metric == "seconds_per_epoch"]
            timed = times[times.recipe == "timing"]
            report.cost(timed if len(timed) else times[times.recipe == MAIN], train_eps[MAIN])
            past = {label: rows for label, rows in histories_of(raw, labels).items() if label in set(part.label)}
            if any(len(rows) > 1 for rows in past.values()):
                report.figure("training", drawn.training(past), "Training: loss, and accuracy at the images (clean or "
                              "attacked) at which the loss takes its cross-entropy")
        table = ablation(own, facts["gammas"], train_eps, dataset, model)
        write_ablation(table, stem, title, f"{stem.replace('_', ' ')}, scale {scale}", out, captions)
    write_json(out / "figures" / "captions.json", captions)
    write_text(out / "claims.csv", judge_all(claims, cells, paper, scale).to_csv(index=False))


def report_released(records: dict[str, str], labels: dict[str, str], table: str | Path, figure: str | Path) -> None:
    """Table (CSV, Markdown, LaTeX) and picture of the authors' own networks.

    Args:
        records: path of the JSON record by method.
        labels: names for people, in the order of the rows.
        table, figure: where to write.
    """
    rows = []
    for method in labels:
        if method in records:
            for row in read_json(records[method])["rows"]:
                said = settings_of(row["attack_variant"])
                rows.append({"label": labels[method], "low": np.nan, "high": np.nan, **row, "eps": said.get("eps", ""),
                             "steps": int(said.get("steps", 0))})
    found = pd.DataFrame(rows)
    found["eps_value"] = [fraction(text) if text else np.nan for text in found.eps]
    last, tau = most_steps(found), found[found.metric == "tau"]
    grid = pd.concat({name: part.pivot_table(index="label", columns="eps", values="value", sort=False)
                      for name, part in (("PGD", last), ("τ", tau))}, axis=1).map("{:.3f}".format)
    grid.columns = pd.MultiIndex.from_tuples([(kind, f"ε = {eps}") for kind, eps in grid.columns])
    tables.write_table(grid, table, f"The authors' released networks, measured here: accuracy under {last.steps.max()}-step "
                       "PGD, and Kendall's τ under the attack against interpretability, at the published 200 points (seed "
                       "99). These are not numbers of the paper.", index="method")
    ticks = dict(zip(last.eps_value, last.eps, strict=True))
    figures.save(drawn.curves(last, "eps_value", list(dict.fromkeys(last.label)), xlabel="ε of the attack",
                              ylabel="accuracy under PGD", ylim=(-0.02, 1.02), ticks=ticks), figure)
