"""Tables and figures of Proper Interpretability, from the tidy table and the cells' arrays.

A file is named by what it shows, data set and network. E1 to E12 are the experiments of SPEC 8.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from cupel.cells import read_tensors
from cupel.evaluation.claims import INDICATED, judge_all
from cupel.files import read_json
from cupel.reporting import figures, tables
from cupel.reporting.figures import panels, signed
from cupel.reporting.paper import Paper, history
from cupel.robust.aai import overlap
from cupel.robust.experiment import fraction

MAIN = "main"
KEYS = ["dataset", "model", "recipe", "method", "label", "attack", "attack_variant", "metric"]
SCOPES = ("all", "two", "one")
UNFORESEEN = {"fog": "Fog", "gabor": "Gabor", "snow": "Snow", "jpeg_linf": "JPEG l∞", "jpeg_l2": "JPEG l2",
              "jpeg_l1": "JPEG l1"}


def draw(paper: Paper) -> None:
    """Everything for each data set and network.

    `paper.labels` has `defences`; `paper.facts` has `train_eps` (text by data set, by recipe), `gammas` (γ by method) and
    `classes` (names by data set).
    """
    own = prepared(paper.cells, paper.labels["defences"])
    paper.rows("cells", own.drop(columns="label"))
    for (dataset, model), chosen in own.groupby(["dataset", "model"], sort=False):
        name, train_eps = f"{dataset}_{model}", paper.facts["train_eps"][dataset]
        part = chosen[(chosen.recipe == MAIN) & ~chosen.method.str.contains("gamma")]
        if len(part):
            report = Report(paper, part, train_eps[MAIN])
            report.accuracy()
            report.interpretation()
            report.stronger()
            report.unforeseen()
            report.pictures()
            report.bound()
            times = chosen[chosen.metric == "seconds_per_epoch"]
            timed = times[times.recipe == "timing"]
            report.cost(timed if len(timed) else times[times.recipe == MAIN])
            report.training()
        table = ablation(chosen, paper.facts["gammas"], train_eps)
        if table.gamma.nunique() > 1:
            where = f"{dataset} {model.replace('_', ' ')}, scale {paper.scale}"
            adv = table[(table.method == "adv") & (table.kind == "attacked")].set_index("train_eps").value.to_dict()
            paper.table(f"ablation_{name}", ablation_table(table), f"{paper.title}: accuracy in percent by γ and ε of the "
                        f"training ({where}).", "method")
            paper.figure(f"ablation_{name}", gamma_curves(table[table.gamma.notna()], adv),
                         f"Int by γ and ε of the training; dashed lines: Adv ({where})")


def settings_of(variant: str) -> dict[str, str]:
    """`eps=8/255 steps=10` as a dict of texts."""
    return dict(part.split("=", 1) for part in variant.split() if "=" in part)


def with_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """Add ε and steps of the attack: `eps` (text, empty for none), `eps_value` (NaN for none), `steps` (0 for none)."""
    said = [settings_of(variant) for variant in rows.attack_variant]
    return rows.assign(eps=[entry.get("eps", "") for entry in said],
                       eps_value=[fraction(entry["eps"]) if "eps" in entry else np.nan for entry in said],
                       steps=[int(entry.get("steps", 0)) for entry in said])


def prepared(cells: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """The cells with `method`, `label`, and ε and steps of the attack; values are means over seeds.

    Columns: `KEYS`, value, low, high, n (of one seed), seeds, failed, and those of `with_settings`. A failed cell has NaN.
    """
    means = tables.summary(tables.with_names(cells, labels), KEYS, n="max")
    return with_settings(means.drop(columns=["seconds", "rate_reached"]))


def most_steps(part: pd.DataFrame) -> pd.DataFrame:
    """ATA under PGD after the largest number of steps, and the clean accuracy on the same points."""
    ata = part[(part.attack == "pgd") & (part.metric == "ata")]
    return ata[(ata.steps == ata.steps.max()) | (ata.eps_value == 0)]


def at_eps(row) -> str:
    """Heading of a column by ε."""
    return f"ε = {row.eps}"


class Report:
    """What is written for one data set and network, under the paper's main recipe.

    `part` has the rows of :func:`prepared` for the data set and network; `train_eps` is text.
    """

    def __init__(self, paper: Paper, part: pd.DataFrame, train_eps: str):
        dataset, model = part[["dataset", "model"]].iloc[0]
        cells, labels = paper.cells, paper.labels["defences"]
        self.paper, self.part, self.train_eps, self.name = paper, part, train_eps, f"{dataset}_{model}"
        self.order = [label for label in labels.values() if label in set(part.label)]
        self.classes = paper.facts["classes"][dataset]
        self.without = {row.label: tables.no_value(row) for row in part.itertuples() if row.failed or row.not_run}
        points = part[(part.metric == "ata") & (part.attack == "pgd")].n
        self.points = int(points.max()) if len(points) else 0
        self.where = f"{self.name.replace('_', ' ')}, scale {paper.scale}, {int(part.seeds.max())} seed(s)"
        raw = cells[(cells.dataset == dataset) & (cells.model == model) & (cells.recipe == MAIN) & (cells.status == "ok")]
        # those of the first seed come first, and count
        self.networks = tables.with_names(raw, labels).drop_duplicates("path").sort_values("seed", kind="stable")
        self.arrays: dict[str, dict] = {}
        for row in self.networks[self.networks.stage == "attacked"].itertuples():
            file = Path(row.path) / "evaluation.npz"
            found = read_tensors(file) if file.is_file() else {}
            self.arrays[row.label] = {**found, **self.arrays.get(row.label, {})}

    def table(self, kind: str, rows: pd.DataFrame, column: Callable[[tuple], object], caption: str, *, percent: bool = True,
              digits: int = 1) -> None:
        """Write a table of methods by whatever `column` makes of a row, if there are values; methods without one say why."""
        rows = rows[rows.value.notna()]
        if rows.empty:
            return
        rows = rows.assign(column=[column(row) for row in rows.itertuples()],
                           text=[f"{100 * value if percent else value:.{digits}f}" for value in rows.value])
        grid = tables.spread(rows, "label", "column")
        grid = grid.reindex(label for label in self.order if label in grid.index or label in self.without).fillna("")
        for label in grid.index[(grid == "").all(axis=1)]:
            grid.loc[label] = self.without.get(label, "")
        self.paper.table(f"{kind}_{self.name}", grid, f"{self.paper.title}: {caption} ({self.where}).", "method")

    def figure(self, kind: str, figure, caption: str) -> None:
        """Save a picture with its caption."""
        self.paper.figure(f"{kind}_{self.name}", figure, f"{caption} ({self.where})")

    def having(self, *names: str) -> dict[str, dict]:
        """Arrays of the methods that have all these names, in order."""
        return {label: self.arrays[label] for label in self.order if set(names) <= set(self.arrays.get(label, {}))}

    # ----------------------------------------------------------------------------------------------- accuracy (E1, E2)

    def accuracy(self) -> None:
        """ATA against ε and steps."""
        ata = self.part[(self.part.attack == "pgd") & (self.part.metric == "ata")]
        if ata.value.isna().all():
            return
        last, train_eps = most_steps(ata).sort_values("eps_value"), fraction(self.train_eps)
        steps = sorted(set(ata.steps[ata.steps > 0]))
        self.table("ata", last, at_eps,
                   f"accuracy in percent under {last.steps.max()}-step PGD of step 0.01 at {self.points} test points; training "
                   f"at ε = {self.train_eps}")
        self.table("ata_steps", ata[ata.steps > 0].sort_values(["eps_value", "steps"]),
                   lambda row: (at_eps(row), f"{row.steps} steps"),
                   "accuracy in percent under PGD by number of steps; k steps reach no further than 0.01 k")
        self.figure("ata", against_eps(last, self.order, "accuracy under PGD", train_eps),
                    f"Accuracy under {last.steps.max()}-step PGD against ε; bands are 95 % intervals of {self.points} points")
        beyond = ata[(ata.eps_value > train_eps) & (ata.steps > 0)]
        for kind, rows in (("steps", ata[np.isclose(ata.eps_value, train_eps)]),
                           ("steps_beyond", beyond[beyond.eps_value == beyond.eps_value.max()])):
            if rows.value.notna().any() and len(steps) > 1:
                eps = rows.eps.iloc[0]
                self.figure(kind, curves(rows, "steps", self.order, f"accuracy, ε = {eps}", xlabel="steps of PGD"),
                            f"Accuracy against the number of PGD steps at ε = {eps}")

    def stronger(self) -> None:
        """Random restarts and ART's attacks beside plain PGD (our addition)."""
        rows = self.part[self.part.attack.isin(["pgd_restarts", "autoattack"])]
        plain = most_steps(self.part)

        def column(row) -> tuple[str, str]:
            said = settings_of(row.attack_variant)
            return at_eps(row), {"pgd": f"PGD, {row.steps} steps", "pgd_restarts": f"PGD, {said.get('restarts')} restarts",
                                 "autoattack": f"ART to {said.get('to')}"}[row.attack]

        if len(rows):
            self.table("stronger", pd.concat([plain[plain.eps.isin(set(rows.eps))], rows]), column,
                       "accuracy in percent under stronger attacks (own addition); each attack of ART takes on the points that "
                       "the one before left standing")

    # -------------------------------------------------------------------------------------- interpretation (E4, E5, E6)

    def interpretation(self) -> None:
        """Kendall's tau under AAI; ISA."""
        tau = self.part[(self.part.attack == "aai") & (self.part.metric == "tau") & self.part.eps.ne("")]
        tau = tau.sort_values("eps_value")
        if tau.value.notna().any():
            self.table("tau", tau, at_eps, "Kendall's τ between clean and attacked class activation map "
                       "(attack against interpretability, top 8), over the points that keep their prediction; empty where none "
                       "does", percent=False, digits=3)
            self.figure("tau", against_eps(tau, self.order, "Kendall's τ", fraction(self.train_eps)),
                        "Rank correlation of clean and attacked class activation maps under the attack against "
                        "interpretability; higher is more robust")
        isa = self.part[self.part.attack == "isa"]
        for metric, text in {"discrepancy": "mean normalised discrepancy", "slope": "normalised slope, per point as released",
                             "slope_per_image": "normalised slope, per image"}.items():
            self.table(f"isa_{metric}", isa[isa.metric == metric],
                       lambda row: tuple([*row.attack_variant.split(), "all channels"][:3]),
                       f"{text} under the interpretability sneaking attack, by map, norm and classes that it counts",
                       percent=False, digits=3)
        lines = []
        for label, found in self.having(*(f"isa_cam_l1_{scope}_{what}" for scope in ("two", "one")
                                          for what in ("discrepancy", "eps", "kept"))).items():
            scopes = {scope: f"isa_cam_l1_{scope}" for scope in SCOPES if f"isa_cam_l1_{scope}_kept" in found}
            kept = np.logical_and.reduce([found[f"{stem}_kept"] for stem in scopes.values()])
            usable = np.flatnonzero(kept.all(0) & np.isfinite(found["isa_cam_l1_one_discrepancy"]).all(0))
            if len(usable):
                lines += [pd.DataFrame({"metric": label, "classes": f"{scope} class{'es' if scope != 'one' else ''}",
                                        "eps": found[f"{stem}_eps"][:, usable[0]],
                                        "value": np.minimum.accumulate(found[f"{stem}_discrepancy"][:, usable[0]])})
                          for scope, stem in scopes.items()]
        if lines:
            rows = pd.concat(lines)
            drawn = figures.lines(rows, "eps", {label: label for label in dict.fromkeys(rows.metric)}, "classes", ticks={},
                                  xscale="linear", xlabel="ε of the attack", ylim=(0, None))
            drawn.supylabel("normalised l1 discrepancy", fontsize=9)
            self.figure("tradeoff", drawn, "What the sneaking attack pays for a small discrepancy of one "
                        "image's maps, by the classes that are counted")

    # ------------------------------------------------------------------------------------------------ bound (E10), maps

    def bound(self) -> None:
        """Tightness of the lower bound."""
        shown = {label: (found["bound_bound"][used], found["bound_apart"][used])
                 for label, found in self.having("bound_apart", "bound_bound", "bound_used").items()
                 if (used := found["bound_used"]).any()}
        if shown:
            self.figure("bound", bound_scatter(shown), "Two-class discrepancy under the targeted attack of least ε against its "
                        "lower bound: no attack can get under the dashed line")
        names = {"bound_ratio": "median discrepancy / bound", "least_eps": "median least ε"}
        self.table("bound", self.part[(self.part.attack == "least_eps") & self.part.metric.isin(names)],
                   lambda row: names[row.metric], "how tight the bound is, and the ε that the targeted attack needs",
                   percent=False, digits=3)

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
                self.figure(f"maps{number + 1}", maps_under_attack(rows, self.classes),
                            "An image and its class activation maps before and under attack; predictions that are wrong are "
                            "red, τ compares a map with the clean one")
        cams = {label: entry["gallery_cams"] for label, entry in self.having("gallery_cams").items()}
        if "Normal" in cams:
            rows = [{"label": label, "value": float(overlap(values, cams["Normal"]).mean())} for label, values in cams.items()
                    if values.shape == cams["Normal"].shape]
            if len(rows) > 1:
                self.table("overlap", pd.DataFrame(rows), lambda row: "of the top 8 cells", "overlap in percent of the eight "
                           "largest cells of the true class's map with those of the Normal net")
        weights = {label: entry["features_filters"] for label, entry in self.having("features_filters").items()}
        if weights:
            self.figure("filters", filters(weights), "Weights of the first convolution")
        reached = self.having("features_reached", "features_start")
        if reached:
            start = next(iter(reached.values()))["features_start"]
            shown = {"seed": start, **{label: entry["features_reached"] for label, entry in reached.items()}}
            rows = [(label, [shown_as_picture(image) for image in images]) for label, images in shown.items()]
            drawn, _ = figures.picture_rows(rows, 1.05, 1.05, [f"for {name}" for name in self.classes[: len(start)]])
            self.figure("neurons", drawn, "Inputs that maximise neurons, reached from the seed images on top; the neuron is "
                        "the one that speaks most for the class above it")

    # --------------------------------------------------------------------------------------- other attacks (E3) and cost (E8)

    def unforeseen(self) -> None:
        """Accuracy under attacks that no training has seen."""
        self.table("unforeseen", self.part[self.part.attack.isin(UNFORESEEN)], lambda row: UNFORESEEN[row.attack],
                   f"accuracy in percent under unforeseen attacks at {self.points} test points")

    def cost(self, times: pd.DataFrame) -> None:
        """Seconds per epoch (label, value; of the timing recipe where it was run) beside accuracy under PGD."""
        ata = self.part[self.part.metric == "ata_train"]
        both = times[["label", "value"]].rename(columns={"value": "seconds"}).merge(ata[["label", "value", "low", "high"]])
        both = both[both.label.isin(self.order) & both.value.notna()]
        if both.empty:
            return
        drawn = figures.scatter(both.assign(panel="", value_low=both.low, value_high=both.high), "seconds",
                                "value", "panel", self.order, xlabel="seconds per training epoch", xlim=(0, None),
                                ylabel=f"accuracy under PGD, ε = {self.train_eps}", ylim=(-0.02, 1.02))
        self.figure("time", drawn, "Seconds of a training epoch against accuracy under PGD at the ε of the training")
        rows = [both.assign(value=both.seconds, kind="seconds per epoch")]
        rows += [both.assign(value=both.seconds / base, kind="of Normal") for base in both.seconds[both.label == "Normal"][:1]]
        self.table("time", pd.concat(rows), lambda row: row.kind, "time of a training epoch", percent=False, digits=1)

    def training(self) -> None:
        """Histories of the networks of the first seed, if any has more than one epoch."""
        trained = self.networks[(self.networks.stage == "trained") & self.networks.label.isin(self.order)]
        first = trained.drop_duplicates("label").set_index("label").path
        past = {label: rows for label in self.order if label in first and len(rows := history(first[label]))}
        if any(len(rows) > 1 for rows in past.values()):
            drawn = figures.histories(past, "epoch", {"loss": "training loss",
                                                      "acc": "accuracy under the loss's cross-entropy"}, ("acc",))
            self.figure("training", drawn, "Training: loss, and accuracy at the images (clean or attacked) at which "
                        "the loss takes its cross-entropy")


def ablation(part: pd.DataFrame, gammas: dict[str, float], train_eps: dict[str, str]) -> pd.DataFrame:
    """Accuracy by γ and ε of the training, clean and attacked, and that of Adv (E9).

    Args:
        part: :func:`prepared`, of one data set and network.
        gammas: γ by method, for `int` and its variants.
        train_eps: ε by recipe.

    Returns:
        Columns method, gamma (NaN for Adv), train_eps, kind (`clean`, `attacked`), eps, value, low, high.
    """
    part = part[(part.attack == "pgd") & (part.metric == "ata") & part.method.isin([*gammas, "adv"])
                & part.recipe.isin(list(train_eps)) & part.value.notna()]
    part = part[(part.eps_value == 0) | ((part.eps == train_eps.get(MAIN)) & (part.steps == part.steps.max()))]
    part = part.assign(gamma=part.method.map(gammas).astype(float), train_eps=part.recipe.map(train_eps),
                       kind=np.where(part.eps_value == 0, "clean", "attacked"))
    return part[["method", "gamma", "train_eps", "kind", "eps", "value", "low", "high"]]


def ablation_table(table: pd.DataFrame) -> pd.DataFrame:
    """Rows: methods by γ; columns: ε of the training, clean and attacked."""
    rows = table.assign(row=[f"Int, γ = {gamma:g}" if gamma == gamma else "Adv" for gamma in table.gamma],
                        trained="trained at ε = " + table.train_eps, text=(100 * table.value).map("{:.1f}".format))
    across = sorted(set(zip(rows.trained, rows.kind, rows.train_eps.map(fraction), strict=True)),
                    key=lambda column: (column[2], column[1] != "clean"))
    return tables.spread(rows.sort_values("gamma"), "row", ["trained", "kind"], across=[column[:2] for column in across])


def report_released(records: dict[str, str], labels: dict[str, str], table: str | Path, figure: str | Path) -> None:
    """Table (CSV, Markdown, LaTeX) and picture of the authors' own networks, from the JSON records by method; rows stand in
    the order of `labels`.

    Raises:
        ValueError: none of them could be measured.
    """
    made = {label: read_json(records[method]) for method, label in labels.items() if method in records}
    rows = [{"label": label, "low": np.nan, "high": np.nan, **row} for label, record in made.items() for row in record["rows"]]
    failed = {label: record["reason"] for label, record in made.items() if record.get("status") == "failed"}
    if not rows:
        raise ValueError(f"no network could be measured: {'; '.join(f'{label}: {why}' for label, why in failed.items())}")
    found = with_settings(pd.DataFrame(rows))
    last, tau = most_steps(found), found[found.metric == "tau"]
    rows = pd.concat([last.assign(kind="PGD"), tau.assign(kind="τ")])
    rows = rows.assign(text=rows.value.map("{:.3f}".format), at=[at_eps(row) for row in rows.itertuples()])
    grid = tables.spread(rows, "label", ["kind", "at"])
    for label in failed:
        grid.loc[label] = "failed"
    tables.write_table(grid.loc[list(made)], table,
                       f"The authors' released networks, measured here: accuracy under {last.steps.max()}-step PGD, and "
                       "Kendall's τ under the attack against interpretability, at the published 200 points (seed 99). These "
                       "are not numbers of the paper." + "".join(f" {label} failed: {why}." for label, why in failed.items()),
                       index="method")
    figures.save(against_eps(last, list(dict.fromkeys(last.label)), "accuracy under PGD"), figure)


def judge_released(claims: dict, records: dict[str, str], table: str | Path, scale: str, trained: Sequence[str] = ()) -> None:
    """The claims judged on the authors' own networks (CSV, Markdown, LaTeX), beside the verdicts on networks trained here.

    Args:
        claims: of claims.yaml.
        records: JSON records by method; one network of each, so that a verdict is never more than indicated.
        table: where to.
        scale: of the networks trained here.
        trained: their claims.csv, or nothing.
    """
    made = {method: read_json(path)["rows"] for method, path in records.items()}
    # one that could not be measured stands there as failed, in whatever is measured of another
    failed = [{**row, "value": np.nan, "status": "failed"} for row in next(filter(None, made.values()))]
    rows = pd.DataFrame([{"status": "ok", **row, "defence": method.partition("~")[0], "variant": method.partition("~")[2],
                          "path": str(records[method])} for method, found in made.items() for row in found or failed])
    cells = rows.assign(paper=claims["paper"], stage="attacked", dataset="mnist", model="small", recipe=MAIN, poison_rate=0.0,
                        budget="", seed=0)
    cells = cells.reindex(columns=[*cells, *({"low", "high", "n"} - {*cells})])
    # the authors trained at the paper's scale, and on one of its data sets
    released = judge_all(claims, cells, claims["paper"], "paper")
    here = pd.concat(map(pd.read_csv, trained)) if trained else released.assign(verdict="not run")
    said = {"released weights (MNIST Small, one network a method)": released, f"trained here (scale {scale})": here}
    found = {heading: verdicts.set_index("claim").apply(verdict_text, axis=1) for heading, verdicts in said.items()}
    grid = pd.DataFrame({"statement": released.set_index("claim").statement, **found})
    tables.write_table(grid.fillna("not run"), table, "The claims, judged on the networks that the authors released and on "
                       "those trained here.", index="claim")


def verdict_text(row) -> str:
    """A verdict with its effect, in the unit of the test, and its interval."""
    if row.verdict in ("not judged", "not run") or pd.isna(row.effect):
        return row.verdict
    side = f" {row.direction}" if row.verdict == INDICATED else ""
    return f"{row.verdict}{side}: {row.effect:+.3f} ({row.low:+.3f} to {row.high:+.3f})"


# ------------------------------------------------------------------------------------------------------------------ figures


def curves(table: pd.DataFrame, x: str, order: Sequence[str], title: str, **settings):
    """A metric against x, one line per label; see `cupel.reporting.figures.lines`."""
    rows = table.assign(metric=title).sort_values("label", key=lambda labels: labels.map(list(order).index), kind="stable")
    return figures.lines(rows, x, {title: title}, "label", **settings)


def against_eps(table: pd.DataFrame, order: Sequence[str], title: str, mark: float | None = None):
    """`curves` against the ε of the attack; at `mark` a dotted line says "ε of the training"."""
    ticks = dict(zip(table.eps_value, table.eps, strict=True))
    figure = curves(table, "eps_value", order, title, xlabel="ε of the attack", ticks=ticks, xscale="linear")
    if mark is not None:
        figure.axes[0].axvline(mark, color="grey", ls=":", lw=1)
        figure.axes[0].annotate("ε of the training", (mark, 1), xycoords=("data", "axes fraction"), va="top", rotation=90,
                                fontsize=7, color="grey")
    return figure


def bound_scatter(shown: dict[str, tuple[np.ndarray, np.ndarray]]):
    """Discrepancy against its lower bound, a panel per method; no point may lie under the line.

    Args:
        shown: (bound, discrepancy) by label, float [n] each.
    """
    figure, axes = panels(len(shown), 4, 2.7, 2.6)
    for axis, (label, (least, apart)) in zip(axes.ravel(), shown.items(), strict=False):
        end = 1.05 * max(apart.max(initial=0), least.max(initial=0), 1e-9)
        axis.plot([0, end], [0, end], color="grey", lw=1, ls="--")
        axis.scatter(least, apart, s=9, color="#0072B2", alpha=0.7, lw=0)
        axis.set(title=f"{label}: median ratio {np.median(apart / least):.2f}", xlim=(0, end), ylim=(0, end))
        axis.title.set_fontsize(8.5)
    figure.supxlabel("half of the clean margin (the bound)", fontsize=9)
    figure.supylabel("two-class l1 discrepancy / hw", fontsize=9)
    return figures.with_numbers(figure, pd.concat([pd.DataFrame({"label": label, "bound": least, "discrepancy": apart})
                                                   for label, (least, apart) in shown.items()]))


def shown_as_picture(image: np.ndarray) -> np.ndarray:
    """An image [C, H, W] as [H, W, C] in [0, 1]."""
    return np.clip(image.transpose(1, 2, 0), 0, 1)


def maps_under_attack(rows: list[dict], classes: Sequence[str]):
    """One image per row: as it is, under PGD, under the sneaking attack; each with the maps of true class and target.

    Args:
        rows: dicts with label, images [3, C, H, W], maps [3, 2, h, w], predicted [3], classes [2] (true, target).
        classes: names.

    A map's colours run over ± the largest absolute value of its row, red positive; the number is Kendall's tau with the map of
    the clean image.
    """
    drawn = []
    for row in rows:
        largest = np.abs(row["maps"]).max()
        drawn.append((row["label"], [picture for image, maps in zip(row["images"], row["maps"], strict=True)
                                     for picture in (shown_as_picture(image), *(signed(map, largest) for map in maps))]))
    figure, axes = figures.picture_rows(drawn, 1.1, 1.32)
    for line, row in zip(axes, rows, strict=True):
        for k in range(3):
            line[3 * k].set_xlabel(f"taken for {classes[int(row['predicted'][k])]}", fontsize=7, labelpad=2,
                                   color="black" if row["predicted"][k] == row["classes"][0] else "crimson")
            for j in range(2):
                tau = "" if k == 0 else f", τ {kendalltau(row['maps'][0, j].ravel(), row['maps'][k, j].ravel()).statistic:.2f}"
                line[3 * k + 1 + j].set_xlabel(f"map of {classes[int(row['classes'][j])]}{tau}", fontsize=7, labelpad=2)
    for k, title in enumerate(("clean", "PGD", "sneaking attack (ISA)")):
        axes[0, 3 * k].set_title(title, fontsize=9, loc="left")
    return figure


def gamma_curves(table: pd.DataFrame, reference: dict[str, float]):
    """Accuracy against γ, clean and attacked, a line per ε of the training; dashed: Adv under attack. See :func:`ablation`."""
    rows = table.assign(metric=table.kind, trained="trained at ε = " + table.train_eps)
    figure = figures.lines(rows, "gamma", {"clean": "clean", "attacked": "attacked"}, "trained", xscale="linear", xlabel="γ")
    for name, colour in figures.palette(table.train_eps).items():
        if name in reference:
            figure.axes[1].axhline(reference[name], color=colour, ls="--", lw=1)
    return figure


def filters(shown: dict[str, np.ndarray]):
    """First-layer weights, a row per method, each filter scaled by its own largest absolute weight.

    Args:
        shown: float [d, C, k, k] by label; with C = 1 red is positive, with C = 3 grey is zero.
    """
    def picture(weight: np.ndarray) -> np.ndarray:
        scaled = weight / max(np.abs(weight).max(), 1e-12)
        return (scaled.transpose(1, 2, 0) + 1) / 2 if len(weight) == 3 else signed(scaled[0], 1)

    rows = [(label, [picture(weight) for weight in weights]) for label, weights in shown.items()]
    return figures.picture_rows(rows, 0.55, 0.62)[0]
