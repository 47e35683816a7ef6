"""Tables and figures of BYE, from the tidy table and the filters' own records."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import entropy, norm

from cupel.cells import failure, read_tensors
from cupel.evaluation.settings import NO_VICTIM
from cupel.files import read_json
from cupel.reporting import figures, tables
from cupel.reporting.figures import COLOURS, panels, plt
from cupel.reporting.paper import Paper, history, victim_histories
from cupel.reporting.tables import frame, no_value
from cupel.vision_language import prepared, triggers

VICTIM = "victim"
MAIN_RATE = 0.1  # of the paper, "unless otherwise stated"
SEVERAL = ("square", "dual", "multi")
KINDS = ("square", "random_position", "checkerboard", "blend", "sig", "wanet")
CLUSTERINGS = ("without_gmm", "without_gmm~nats", "two_means", "bye")
GROWTH = ("bye", "bye~rss", "bye~starts")
OWN = "BYE"  # how the sources of the paper's own numbers begin
CURVES = 8  # victims in the figure of training
CLEAN, POISONED, BOTH = COLOURS[5], COLOURS[6], COLOURS[0]
FOUND = {"precision": "precision", "recall": "recall", "f1": "F1"}


def draw(paper: Paper) -> None:
    """Every table and figure that the cells are enough for.

    `paper.labels` has `defences` and `attacks`; `paper.facts` has `attacks` (function and settings by name), `datasets`
    (folder by name) and `targets` (by data set); `paper.files` has `bases`: records of the models that were built.
    """
    numbers, records = Numbers(paper), filter_records(paper.cells)
    _tables(paper, numbers, records)
    looked: dict[Setting, tuple[dict, Path]] = {}
    for setting, _, record, path in records:
        if "failed" not in record and (path / "entropies.parquet").is_file():  # what is kept of a run has them not
            looked.setdefault(setting, (record, path))
    for main in (main for main in numbers.mains if main in looked):
        _victim_figures(paper, numbers, main, looked)
    _comparison_figures(paper, numbers)
    _growth_figures(paper, numbers, records)
    if histories := victim_histories(paper.cells, CURVES):
        paper.figure("training", figures.training_curves(histories), "Fine-tuning of the victims: loss per answer token, and "
                     "share of answer tokens right on clean and on poisoned samples.")
    used = {setting.trigger for setting in numbers.settings}
    for name, folder in paper.facts["datasets"].items():
        if (sheet := trigger_sheet(folder, paper, used)) is not None:
            paper.figure(f"triggers_{name}", sheet, f"Triggers on test pictures of {name}; last, the difference to the "
                         "untouched picture, amplified around grey by the factor on the left.")


# ------------------------------------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Setting:
    """What victims of several seeds share."""

    dataset: str
    model: str
    recipe: str
    trigger: str
    rate: float

    @classmethod
    def of(cls, row) -> "Setting":
        """That of a row of the tidy table."""
        return cls(row.dataset, row.model, row.recipe, tables.attack_name(row), row.poison_rate)

    def name(self, *keys: str) -> str:
        """Some of it, in words."""
        return ", ".join(f"{100 * self.rate:g} %" if key == "rate" else getattr(self, key) for key in keys)

    def same(self, other: "Setting", *keys: str) -> bool:
        """Whether two settings agree in some of it."""
        return all(getattr(self, key) == getattr(other, key) for key in keys)


class Numbers:
    """The tidy table of the paper, by setting, stage, method and metric (means over seeds), beside published numbers.

    Attributes:
        labels: names for people, by defence; `victim` first.
        attacks: label by trigger, in the order of the file.
        functions: function by trigger.
        settings: of the victims.
        mains: of every data set and model its main victim: that with the most defences; of these the first recipe, the first
            trigger of the file, 10 % or the highest rate. A model of which no victim is purified stands in the curves alone,
            unless all are like that.
    """

    def __init__(self, paper: Paper):
        self.labels, self.attacks = {VICTIM: "no defence (vanilla)", **paper.labels["defences"]}, paper.labels["attacks"]
        self.functions = {name: entry["function"] for name, entry in paper.facts["attacks"].items()}
        named = tables.with_names(paper.cells, paper.labels["defences"])
        self.rows = {(Setting.of(row), stage, row.method, row.metric): row for stage, part in named.groupby("stage", sort=False)
                     for row in tables.summary(part).itertuples()}
        self.settings = list(dict.fromkeys(Setting.of(row) for row in named[named.stage == VICTIM].itertuples()))
        order, groups = list(self.attacks), {}
        refitted = named[named.stage == "purified"]
        defences = Counter(setting for setting, _ in {(Setting.of(row), row.method) for row in refitted.itertuples()})
        purified = {(setting.dataset, setting.model) for setting in defences}
        for setting in self.settings:
            if not purified or (setting.dataset, setting.model) in purified:
                groups.setdefault((setting.dataset, setting.model), []).append(setting)
        self.mains = [min(group, key=lambda setting, first=group[0].recipe: (
            -defences[setting], setting.recipe != first, order.index(setting.trigger), setting.rate != MAIN_RATE,
            -setting.rate)) for group in groups.values()]
        # the paper's own come last and take the place of others
        published = paper.reported.assign(own=paper.reported.source.str.startswith(OWN)).sort_values("own", kind="stable")
        self.published = {(row.dataset, row.model, row.attack, row.poison_rate, row.defence, row.metric): row
                          for row in published.itertuples()}

    def row(self, setting: Setting, stage: str, method: str, metric: str):
        """The row of a number, or None; of a job that failed for all filters at once, its own."""
        known = self.rows.get((setting, VICTIM if method == VICTIM else stage, method, metric))
        return known if known is not None or stage != "filtered" else self.rows.get((setting, stage, "", metric))

    def value(self, *place) -> float:
        """A number, NaN for none; see `row`."""
        row = self.row(*place)
        return np.nan if row is None else row.value

    def text(self, setting: Setting, stage: str, method: str, metric: str, *, count: bool = False, interval=False) -> str:
        """A number for a table: percent, with ‡ where a victim is not valid, or as it is where it counts something; `failed` or
        `not run`; empty for none."""
        row = self.row(setting, stage, method, metric)
        if row is None or np.isnan(row.value):
            failed = row if row is not None else self.row(setting, stage, method, {"filtered": "f1"}.get(stage, "cp"))
            return "" if failed is None else no_value(failed)
        if count:
            return f"{row.value:g}" if row.value == int(row.value) else f"{row.value:.1f}"
        bounds = f" ({100 * row.low:.1f} to {100 * row.high:.1f})" if interval and not np.isnan(row.low) else ""
        return f"{100 * row.value:.1f}{bounds}{'' if row.credited else ' ‡'}"

    def texts(self, setting: Setting, stage: str, method: str, headings: dict[str, str], **options) -> dict[str, str]:
        """Numbers for a row of a table: heading to text; `headings` by metric."""
        return {heading: self.text(setting, stage, method, metric, **options) for metric, heading in headings.items()}

    def left(self, setting: Setting, method: str) -> tuple:
        """Where the number of poisoned samples left for fine-tuning stands."""
        return (setting, "filtered", "bye", "poisoned") if method == VICTIM else (setting, "purified", method, "left")

    def reported(self, setting: Setting, method: str, metric: str) -> str:
        """A published number in percent, with a dagger where it is not the paper's own; empty for none."""
        row = self.published.get((setting.dataset, setting.model, setting.trigger, setting.rate, method, metric))
        return "" if row is None else f"{row.value:g}" + ("" if row.own else " †")

    def beside(self, setting: Setting, method: str, headings: dict[str, str]) -> dict[str, str]:
        """Published numbers for a row of a table; `headings` by metric."""
        return {f"{heading} reported": self.reported(setting, method, metric) for metric, heading in headings.items()}

    def methods(self, stage: str, settings: list[Setting]) -> list[str]:
        """Methods with a number in these settings, in the order of experiment.yaml, without the sweep's."""
        found = {method for setting, at, method, _ in self.rows if at == stage and setting in settings}
        return [name for name in self.labels if name in found]

    def answering(self, settings: list[Setting]) -> list[str]:
        """The victim and the methods after which a model was asked."""
        return [VICTIM, *self.methods("purified", settings)]

    def like(self, main: Setting, *keys: str) -> list[Setting]:
        """Settings that agree with one in these keys."""
        return [setting for setting in self.settings if setting.same(main, *keys)]


def filter_records(cells: pd.DataFrame) -> list[tuple[Setting, int, dict, Path]]:
    """Setting, seed, account of the filters, and folder of every victim whose filters have run."""
    rows = cells[cells.stage == "filtered"].drop_duplicates("path")
    return [(Setting.of(row), row.seed, read_json(Path(row.path) / "filters.json"), Path(row.path)) for row in rows.itertuples()
            if (Path(row.path) / "filters.json").is_file()]


# ------------------------------------------------------------------------------------------------------------------- tables


def _tables(paper: Paper, numbers: Numbers, records: list) -> None:
    """All tables; one that has nothing to say is left out."""
    mains, scale = numbers.mains, f"scale {paper.scale}"
    place = f"{scale}, mean over {len({seed for _, seed, _, _ in records})} seed(s); ‡: {NO_VICTIM}"

    target = "”, “".join(dict.fromkeys(paper.facts["targets"].values()))

    def triggers_of(settings: Iterable[Setting]) -> str:
        return ", ".join(dict.fromkeys(f"{numbers.attacks[s.trigger]} at {s.name('rate')}" for s in settings))

    for model in dict.fromkeys(setting.model for setting in mains):
        part = [setting for setting in mains if setting.model == model]
        paper.table(f"table1_cp_asr_{model}", answers_table(numbers, part),
                    f"{paper.title}. Table 1: CP and ASR in percent, {model}, {triggers_of(part)}, {place}. CP: share of right "
                    f"answers on untouched test samples (captions: CIDEr-D × 100); ASR: share of all triggered test samples "
                    f"answered with “{target}”. Both exact, case ignored.")
    paper.table("table1_details", details_table(numbers),
                f"Table 1 in detail: every way to score the answers, in percent with 95 % intervals, {place}. “Contains”: the "
                "target anywhere in the answer; “right on triggered”: the true answer to a triggered picture.",
                "setting: defence")
    paper.table("table2_detection", detection_table(numbers),
                f"Table 2: poisoned samples found among the training samples, in percent, {triggers_of(mains)}, {place}. No "
                "model is fitted again for this. AUROC is of what the filter looks at, and absent where it looks at nothing "
                "(random, oracle, no sensitive layer).", "setting: filter")
    dagger = "Reported numbers with † are of third parties."
    paper.table("table3_several_squares", triggers_table(numbers, SEVERAL),
                f"Table 3: several squares, in percent, {place}. {dagger}", "setting: trigger")
    paper.table("table4_data", data_table(paper, numbers),
                f"Table 4: number of samples, and the models that were built here; {scale}.", "data")
    for setting in mains:
        paper.table("table5_tau" if len(mains) == 1 else f"table5_tau_{setting.dataset}_{setting.model}",
                    tau_table(numbers, setting),
                    f"Table 5: threshold τ of the layer test on {setting.name('dataset', 'model', 'trigger', 'rate')}, "
                    f"{place}. Number of sensitive layers and detection in percent, by the code's and by the paper's formula; "
                    "– where none passes.", "τ")
    paper.table("table6_triggers", triggers_table(numbers, KINDS),
                f"Table 6: kinds of trigger, in percent, {place}. Blend, SIG and WaNet are not in the paper. {dagger}",
                "setting: trigger")
    paper.table("table7_clustering", clustering_table(numbers),
                f"Table 7: F1 in percent by what divides the entropies of the sensitive layers, {place}.", "division")
    paper.table("table8_hazards", hazards_table([record[:3] for record in records], numbers.labels),
                "Hazards: BYE on every victim. Without a sensitive layer nothing is flagged. “Most removed”: more than half of "
                "the training set; “removed above kept”: some removed sample has a higher aggregated entropy than one that is "
                "kept.", "victim: filter")
    paper.table("table9_rates", rates_table(numbers),
                f"By poison rate, in percent, {place}. At 0 % every removed sample is a false alarm.", "setting")
    paper.table("table9_recipes", recipes_table(numbers), f"By recipe of fine-tuning, in percent, {place}.", "setting")
    paper.table("table9_models", models_table(numbers),
                f"By model, in percent, {place}. AUROC is of the mean entropy of all layers.", "setting")


def answers_table(numbers: Numbers, settings: list[Setting]) -> pd.DataFrame:
    """Table 1: CP and ASR, a row per defence, columns per data set."""
    return frame({numbers.labels[method]: {(setting.dataset, heading): text for setting in settings for heading, text in {
        **numbers.texts(setting, "purified", method, {"cp": "CP", "asr": "ASR"}),
        **numbers.beside(setting, method, {"cp": "CP", "asr": "ASR"})}.items()} for method in numbers.answering(settings)})


def details_table(numbers: Numbers) -> pd.DataFrame:
    """Every way to score the answers, with intervals."""
    columns = {"cp": "CP", "cp_stripped": "CP, lenient", "cp_letter": "CP, letter", "asr": "ASR",
               "asr_contains": "ASR, contains", "cp_triggered": "right on triggered"}
    return frame({f"{setting.name('dataset', 'model')}: {numbers.labels[method]}": {
        **numbers.texts(setting, "purified", method, columns, interval=True),
        "removed": numbers.text(setting, "purified", method, "removed", count=True),
        "poison left": numbers.text(*numbers.left(setting, method), count=True)}
        for setting in numbers.mains for method in numbers.answering([setting])})


def detection_table(numbers: Numbers) -> pd.DataFrame:
    """Table 2: what the filters find, without fitting again."""
    return frame({f"{setting.name('dataset', 'model')}: {numbers.labels[method]}": {
        **numbers.texts(setting, "filtered", method, {"precision": "precision", "recall": "recall"}, interval=True),
        **numbers.texts(setting, "filtered", method, {"f1": "F1", "auroc": "AUROC"}),
        **numbers.texts(setting, "filtered", method, {"flagged": "removed", "left": "poison left", "samples": "of samples"},
                        count=True),
        "clean removed": numbers.text(setting, "filtered", method, "false_alarm"),
        **numbers.beside(setting, method, FOUND)}
        for setting in numbers.mains for method in numbers.methods("filtered", [setting])})


def before_after(numbers: Numbers, setting: Setting) -> dict[str, str]:
    """CP and ASR of the victim, and of the model fitted again on what BYE leaves."""
    return {f"{metric.upper()} {word}": numbers.text(setting, "purified", method, metric)
            for metric in ("cp", "asr") for word, method in (("before", VICTIM), ("after", "bye"))}


def triggers_table(numbers: Numbers, functions: tuple[str, ...]) -> pd.DataFrame | None:
    """Tables 3 and 6: BYE against several triggers; None with fewer than two of them."""
    settings = [setting for setting in numbers.settings if numbers.functions[setting.trigger] in functions
                and any(setting.same(main, "dataset", "model", "recipe", "rate") for main in numbers.mains)]
    if len({setting.trigger for setting in settings}) < 2:
        return None
    return frame({f"{setting.name('dataset', 'model')}: {numbers.attacks[setting.trigger]}": {
        **before_after(numbers, setting), **numbers.texts(setting, "filtered", "bye", {**FOUND, "auroc": "AUROC"}),
        **numbers.beside(setting, "bye", {"asr": "ASR", "f1": "F1"})}
        for setting in sorted(settings, key=lambda setting: list(numbers.attacks).index(setting.trigger))})


def data_table(paper: Paper, numbers: Numbers) -> pd.DataFrame:
    """Table 4: sizes of what was used and of what the paper used, and the models that were built here."""
    bases, rows = [read_json(path) for path in paper.files["bases"]], {}
    for name, folder in paper.facts["datasets"].items():
        manifest = read_json(Path(folder) / "manifest.json")
        counts, own = manifest["counts"], paper.reported[paper.reported.dataset == manifest["name"]]
        row = rows[name] = {"task": manifest["task"], "metric": manifest["metric"],
                            "excerpt": "yes" if manifest["excerpt"] else ""}
        for split in ("train", "test"):
            known = own[own.metric == f"n_{split}"].value
            row |= {split: str(counts[split]), f"{split} reported": f"{known.iloc[0]:g}" if len(known) else ""}
        rates = {setting.rate for setting in numbers.settings if setting.dataset == name}
        row["poisoned"] = ", ".join(str(int(rate * counts["train"] + 1e-9)) for rate in sorted(rates))
        row["pretraining"] = str(counts.get("pretrain", ""))
        for base in (base for base in bases if base["dataset"] == name):
            built = base["status"] == "ok"
            row |= {f"{base['model']}: weights": f"{base['parameters']:,}" if built else "failed",
                    f"{base['model']}: CP before fine-tuning": f"{100 * base['cp']:.1f}" if built else "failed"}
    return frame(rows)


def tau_table(numbers: Numbers, setting: Setting) -> pd.DataFrame:
    """Table 5: BYE at several thresholds of the layer test, by both formulas."""
    rows = {}
    for tau in sorted({float(method.partition("_tau")[2]) for at, stage, method, _ in numbers.rows
                       if at == setting and stage == "filtered" and "_tau" in method}):
        row = rows[f"{tau:g}"] = {}
        for rule, title in (("sum", "σ₁ + σ₂ (code)"), ("rss", "√(σ₁² + σ₂²) (paper)")):
            place = setting, "filtered", f"bye~{rule}_tau{tau:g}"
            row[title, "layers"] = numbers.text(*place, "sensitive_layers", count=True)
            for metric, heading in FOUND.items():
                row[title, heading] = numbers.text(*place, metric) if row[title, "layers"] != "0" else "–"
        row["reported", "F1"] = numbers.reported(setting, f"bye~tau{tau:g}", "f1")
    return frame(rows)


def clustering_table(numbers: Numbers) -> pd.DataFrame:
    """Table 7: F1 by what divides the aggregated entropies."""
    return frame({{"bye": "GMM (BYE)"}.get(method, numbers.labels[method]): {
        (setting.name("dataset", "model"), heading): text for setting in numbers.mains for heading, text in (
            ("F1", numbers.text(setting, "filtered", method, "f1")), ("F1 reported", numbers.reported(setting, method, "f1")))}
        for method in CLUSTERINGS if method in numbers.methods("filtered", numbers.mains)})


def hazards_table(records: list[tuple[Setting, int, dict]], labels: dict[str, str]) -> pd.DataFrame:
    """What BYE does where its assumptions fail: no sensitive layer, most removed, far tails removed, clean data flagged."""
    rows, said = {}, {True: "YES", False: "no"}
    for setting, seed, record in records:
        where = f"{setting.name('dataset', 'model', 'recipe', 'trigger', 'rate')}, seed {seed}"
        if "failed" in record:
            rows[where] = {"what it says": f"failed: {record['failed']}"}
        for name, entry in record.get("filters", {}).items():
            hazards, false = entry["hazards"], entry["detection"].get("false_alarm")
            if entry["function"] == "bye":
                rows[f"{where}: {labels[name]}"] = {
                    "sensitive layers": ", ".join(map(str, entry["record"]["sensitive"])) or "none",
                    "removed": f"{100 * hazards['share_flagged']:.1f} %",
                    "clean removed": "" if false is None else f"{100 * false:.1f} %",
                    "most removed": said[hazards["majority_removed"]], "removed above kept": said[hazards["non_monotone"]],
                    "what it says": entry["record"]["message"]}
    return frame(rows)


def rates_table(numbers: Numbers) -> pd.DataFrame:
    """BYE by poison rate, 0 % among them, where there are several."""
    rows = {}
    for main in numbers.mains:
        settings = numbers.like(main, "dataset", "model", "recipe", "trigger")
        for setting in sorted(settings, key=lambda setting: setting.rate) if len(settings) > 1 else []:
            row = rows[setting.name("dataset", "model", "trigger", "rate")] = before_after(numbers, setting)
            for method, title in (("bye", "BYE"), ("bye~rss", "by the paper's formula")):
                row[f"{title}: layers"] = numbers.text(setting, "filtered", method, "sensitive_layers", count=True)
                row |= numbers.texts(setting, "filtered", method, {
                    "false_alarm": f"{title}: clean removed", "recall": f"{title}: recall", "f1": f"{title}: F1"})
    return frame(rows)


def recipes_table(numbers: Numbers) -> pd.DataFrame:
    """The same victim by recipe (schedule), where there are several."""
    several = [settings for main in numbers.mains
               if len(settings := numbers.like(main, "dataset", "model", "trigger", "rate")) > 1]
    return frame({setting.name("dataset", "model", "recipe"): {
        **before_after(numbers, setting), "F1 of BYE": numbers.text(setting, "filtered", "bye", "f1")}
        for settings in several for setting in settings})


def models_table(numbers: Numbers) -> pd.DataFrame:
    """BYE's filter by model, for recipes that several models of a data set have."""
    victims = {"cp": "CP", "asr": "ASR"}
    groups = {}
    for setting in numbers.settings:
        if any(setting.same(main, "dataset", "trigger", "rate") for main in numbers.mains):
            groups.setdefault((setting.dataset, setting.recipe), []).append(setting)
    several = [settings for settings in groups.values() if len(settings) > 1]
    return frame({setting.name("dataset", "model", "recipe"): {
        **numbers.texts(setting, VICTIM, VICTIM, victims),
        "AUROC": numbers.text(setting, "filtered", "without_bsi", "auroc"),
        **{f"{numbers.labels[method]}: {heading}": numbers.text(setting, "filtered", method, metric, count=metric not in FOUND)
           for method in GROWTH for metric, heading in (("sensitive_layers", "layers"), ("f1", "F1"))}}
        for settings in several for setting in settings})


# ------------------------------------------------------------------------------------------------------------------ figures


def _victim_figures(paper: Paper, numbers: Numbers, main: Setting, looked: dict[Setting, tuple[dict, Path]]) -> None:
    """What is seen inside a main victim."""
    record, path = looked[main]
    where, stem = main.name("dataset", "model"), f"{main.dataset}_{main.model}"
    layers = shown_layers(len(record["layers"]))
    if rows := map_rows(path, 2):
        paper.figure(f"maps_{stem}", attention_maps(rows, layers), "Attention from the last prompt position to the picture, "
                     f"head mean, by layer ({where}). Each map has its own scale; its entropy H in nats stands below, blue for "
                     "untouched and orange for triggered test pictures.")
    others = [setting for setting in looked if setting != main and setting.same(main, "dataset", "model", "recipe", "rate")]
    rows = [row for setting in (main, *others) for row in map_rows(looked[setting][1], 1, numbers.attacks[setting.trigger])]
    if others and rows:
        paper.figure(f"responses_{stem}", attention_maps(rows, layers), f"Responses of attention to every trigger ({where}).")
    paper.figure(f"entropies_{stem}", entropy_histograms(histogram_panels(path, record, numbers.labels)),
                 f"Entropies of the training samples ({main.name('dataset', 'model', 'trigger', 'rate')}) with the fitted "
                 "mixture: first what BYE decides on, where a layer is sensitive, then single layers. Colours are the truth, "
                 "unseen by filters.")
    twins = [setting for setting in looked if setting.same(main, "dataset", "model", "recipe") and not setting.rate]
    shown = {setting.name("trigger", "rate"): looked[setting][0]["layers"] for setting in dict.fromkeys((main, *twins))}
    paper.figure(f"layers_{stem}", layer_separation(shown, 2.0), "Separation of the two components in every layer, by both "
                 f"formulas, and how well low entropy tells poisoned samples ({where}).")


def _comparison_figures(paper: Paper, numbers: Numbers) -> None:
    """Filters beside each other."""
    points = [{"panel": setting.name("dataset", "model"), "label": numbers.labels[method], "group": FOUND[metric], "failed": 0,
               "value": numbers.value(setting, "filtered", method, metric)}
              for setting in numbers.mains for method in numbers.methods("filtered", [setting]) for metric in FOUND]
    if points:
        order = [numbers.labels[name] for name in numbers.methods("filtered", numbers.mains)]
        colours = {"F1": CLEAN, "precision": COLOURS[2], "recall": COLOURS[1]}
        paper.figure("f1", figures.bars(pd.DataFrame(points), order, colours, lying=True), "F1, precision and recall of every "
                     "filter. The paper's ablation (Fig. 4) is BYE, without GMM, without BSI, and without both.")
    doses = dose_points(numbers, numbers.mains)
    if (doses[doses.oracle].groupby("setting").size() > 1).any():
        paper.figure("dose", dose_response(doses), "Dose and response: ASR against the number of poisoned samples left for "
                     "fine-tuning. The line goes through the oracle's doses and the victim; marks are other filters.")


def _growth_figures(paper: Paper, numbers: Numbers, records: list) -> None:
    """The collapse against updates of fine-tuning and against weights, for data sets with several of either."""
    sizes = {(base["dataset"], base["parameters"]): base["model"] for base in reversed([*map(read_json, paper.files["bases"])])}
    weights = {(dataset, model): size for (dataset, size), model in sizes.items()}  # of one size the first
    victims = paper.cells[paper.cells.stage == VICTIM].drop_duplicates("path")
    updates = {(Setting.of(row), row.seed): rows["step"].iloc[-1] for row in victims.itertuples()
               if len(rows := history(row.path))}
    titles = {"auroc": "AUROC of low entropy", "bsi_sum": "separation, |Δμ| / (σ₁ + σ₂)", "f1": "F1"}
    for main in {main.dataset: main for main in reversed(numbers.mains)}.values():
        for stem, xlabel, alike, at in (
                ("updates", "updates of fine-tuning", ("dataset", "model", "trigger", "rate"), updates.get),
                ("weights", "weights", ("dataset", "recipe", "trigger", "rate"),
                 lambda key: weights.get((key[0].dataset, key[0].model)))):
            found = max((growth([(at((setting, seed)), record) for setting, seed, record, _ in records
                                 if setting.same(one, *alike) and "failed" not in record and at((setting, seed))])
                         for one in numbers.like(main, "dataset", "trigger", "rate")), key=lambda table: table.x.nunique())
            if found.x.nunique() < 2:
                continue
            figure = figures.lines(found.assign(label=found.label.replace(numbers.labels)), "x", titles, "label", xlabel=xlabel)
            figure.axes[1].axhline(2, color=POISONED, lw=1, ls="--")
            where = main.name("dataset", "trigger", "rate")
            paper.figure(f"growth_{stem}_{main.dataset}", figure, f"The collapse against {xlabel} ({where}): how well low "
                         "entropy tells poisoned samples in every layer, how far apart its two components lie (above the "
                         "dashed line a layer is sensitive, by the code's rule), and the F1 that follows. Means over seeds, "
                         "with the lowest and the highest.")


def growth(accounts: list[tuple[float, dict]]) -> pd.DataFrame:
    """Points of `_growth_figures`: x, label (layer, or name of a filter), metric, mean value, and low and high, the extremes.

    Args:
        accounts: x, and the account of the filters of one victim.
    """
    rows = [(x, f"layer {layer['layer']}", metric, layer[metric]) for x, record in accounts for layer in record["layers"]
            for metric in ("auroc", "bsi_sum")]
    rows += [(x, name, "f1", record["filters"][name]["detection"].get("f1")) for x, record in accounts for name in GROWTH
             if name in record["filters"]]
    table = pd.DataFrame(rows, columns=["x", "label", "metric", "value"]).astype({"value": float}).dropna()
    return table.groupby(["x", "label", "metric"], sort=False).value.agg(
        value="mean", low="min", high="max").reset_index()


def dose_points(numbers: Numbers, settings: list[Setting]) -> pd.DataFrame:
    """ASR and poisoned samples left, of victims and of refits by any filter: the points of `dose_response`."""
    rows = [(setting.name("dataset", "model"), numbers.labels[method], method == VICTIM or method.split("~")[0] == "oracle",
             numbers.value(*numbers.left(setting, method)), asr.value, asr.low, asr.high)
            for setting in settings for method in numbers.answering([setting])
            if (asr := numbers.row(setting, "purified", method, "asr")) is not None]
    return pd.DataFrame(rows, columns=["setting", "label", "oracle", "left", "value", "low", "high"]).dropna(
        subset=["left", "value"], ignore_index=True)


def histogram_panels(folder: Path, record: dict, labels: dict[str, str], most: int = 8) -> list[dict]:
    """Panels for `entropy_histograms`: what BYE and its variants decide on, and the layers with the largest separation."""
    values = pd.read_parquet(folder / "entropies.parquet").filter(regex=r"^layer_\d+$").to_numpy(np.float64)  # Shannon's
    poisoned = np.isin(np.arange(len(values)), record["poisoned"])
    decided = [{"title": f"{labels[name]}:\nmean of {len(layers)} sensitive layer(s)", "poisoned": poisoned,
                "values": values[:, layers].mean(1), "mixture": entry["record"]["aggregated"]}
               for name, entry in record["filters"].items()
               if entry["function"] == "bye" and entry["settings"].get("measure", "shannon") == "shannon"
               and (layers := entry["record"]["sensitive"])]
    chosen = sorted(record["layers"], key=lambda layer: -layer["bsi_sum"])[:most]
    return decided + [
        {"title": f"layer {layer['layer']}\nseparation {layer['bsi_rss']:.2f} (paper), {layer['bsi_sum']:.2f} (code)",
         "values": values[:, layer["layer"]], "poisoned": poisoned, "mixture": layer}
        for layer in record["layers"] if layer in chosen]


def map_rows(folder: Path, count: int, title: str = "") -> list[dict]:
    """Rows for `attention_maps`: some test pictures without and with the trigger; with a title, the triggered ones alone."""
    found = read_tensors(folder / "maps.npz")
    if not found:
        return []
    return [{"title": title or word, "picture": np.moveaxis(found["pictures"][side, k], 0, -1), "maps": found["maps"][side, k],
             "trigger": bool(side)}
            for k in range(min(count, found["maps"].shape[1]))
            for side, word in enumerate(("clean", "triggered")) if side or not title]


def trigger_sheet(folder: str | Path, paper: Paper, used: set[str], count: int = 5):
    """The triggers on test pictures, those `used` in the grid first; None where the pictures differ in size."""
    samples = prepared.load(folder, "test")
    images = [record["image"] for record in samples.records]
    chosen = [images.index(image) for image in list(dict.fromkeys(images))[:count]]
    clean = [samples.image(k) for k in chosen]
    if len({picture.shape for picture in clean}) > 1:
        return None
    # of those that are not run, the plain ones
    names = [name for name in paper.facts["attacks"] if name in used or "~" not in name]
    rows, changes = [("clean", [*clean, np.full_like(clean[-1], 128)])], []
    for name in sorted(names, key=lambda name: name not in used):
        entry = paper.facts["attacks"][name]
        try:
            stamped = [triggers.stamp(entry["function"], picture, 0, samples[k]["id"], **entry["settings"])
                       for k, picture in zip(chosen, clean, strict=True)]
        except Exception as error:  # its victims are failed cells with that reason
            print(f"{name} is left out: {failure(error)}")
            continue
        difference, factor = figures.amplified(stamped[-1], clean[-1])
        changed = stamped[-1].astype(int) - clean[-1]
        changes.append({"trigger": name, "run": name in used, "amplified": factor, "largest_change": np.abs(changed).max(),
                        "pixels_changed": changed.any(-1).mean()})
        rows.append((f"{paper.labels['attacks'][name]}{'' if name in used else ' (not run)'}\ndifference ×{factor}",
                     [*stamped, difference]))
    figure, _ = figures.picture_rows(rows, 1.1, 1.02, [""] * len(clean) + ["difference"])
    return figures.with_numbers(figure, pd.DataFrame(changes))


def shown_layers(count: int, most: int = 5) -> list[int]:
    """Up to `most` layers, evenly spread, the first and the last among them."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(most, count))})


def attention_maps(rows: list[dict], layers: list[int]):
    """Attention over the picture: a row per picture, a column per layer, the picture itself first.

    Args:
        rows: dicts with `title`, `picture` uint8 [H, W, 3], `maps` float [L, R, C] (each sums to 1) and `trigger` (bool).
        layers: those shown.
    """
    greys = [np.repeat(row["picture"].mean(-1, keepdims=True), 3, -1).astype(np.uint8) for row in rows]
    figure, axes = figures.picture_rows([(row["title"], [row["picture"], *[grey] * len(layers)])
                                         for row, grey in zip(rows, greys, strict=True)], 1.5, 1.62,
                                        ["picture", *(f"layer {layer}" for layer in layers)])
    shown = []
    for line, row in zip(axes, rows, strict=True):
        height, width = row["picture"].shape[:2]
        for axis, layer in zip(line[1:], layers, strict=True):
            p = row["maps"][layer]
            # each map has its own scale: where attention goes, not how much of it goes to the picture
            axis.imshow(p, cmap="inferno", alpha=0.75, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            nats = entropy(p, axis=None)
            axis.set_xlabel(f"H = {nats:.2f}", fontsize=7, labelpad=1,
                            color=POISONED if row["trigger"] else CLEAN)
            shown += [{"row": row["title"], "layer": layer, "y": y, "x": x, "attention": value, "entropy": nats}
                      for (y, x), value in np.ndenumerate(p)]
    return figures.with_numbers(figure, pd.DataFrame(shown))


def entropy_histograms(shown: list[dict]):
    """Entropies of training samples, clean and poisoned by the truth, with the fitted mixture.

    Args:
        shown: dicts with `title`, `values` float [N], `poisoned` bool [N] and `mixture`: a record with mean, sd and weight of
            two components, or None.
    """
    figure, axes = panels(len(shown), 4, 3.1, 2.5)
    counts = []
    for axis, panel in zip(axes.ravel(), shown, strict=False):
        values, poisoned = panel["values"], panel["poisoned"]
        edges = np.histogram_bin_edges(values, 60)
        width = edges[1] - edges[0]
        # counts of both kinds on one scale; the rare kind is drawn over the other
        axis.hist(values[~poisoned], edges, color=CLEAN, alpha=0.55, label="clean")
        axis.hist(values[poisoned], edges, color=POISONED, alpha=0.75, label="poisoned")
        counts.append(pd.DataFrame({
            "panel": panel["title"].replace("\n", ", "), "low": edges[:-1], "high": edges[1:],
            **{name: np.histogram(values[kind], edges)[0] for name, kind in (("clean", ~poisoned), ("poisoned", poisoned))}}))
        mixture = panel["mixture"]
        if mixture and mixture["mean"]:
            x = np.linspace(edges[0], edges[-1], 400)
            parts = [len(values) * width * weight * norm.pdf(x, mean, sd)
                     for mean, sd, weight in zip(mixture["mean"], mixture["sd"], mixture["weight"], strict=True)]
            axis.plot(x, sum(parts), color=BOTH, lw=1, label="mixture")
            for part, style in zip(parts, ("--", ":"), strict=True):
                axis.plot(x, part, color=BOTH, lw=0.9, ls=style)
        axis.set_title(panel["title"], fontsize=8)
        axis.set_xlabel("entropy (nats)", fontsize=8)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
    axes[0, 0].legend(fontsize=7)
    axes[0, 0].set_ylabel("training samples")
    return figures.with_numbers(figure, pd.concat(counts))


def layer_separation(settings: dict[str, list[dict]], tau: float):
    """Separation of the two components in every layer, by both formulas, and how well low entropy tells poisoned samples;
    by title of the setting one dict per layer with `layer`, `bsi_rss`, `bsi_sum` and `auroc` (or None)."""
    figure, axes = panels(2 * len(settings), 2, 4.5, 2.6)
    table = pd.concat([pd.DataFrame(layers).assign(setting=title) for title, layers in settings.items()])
    table = table[["setting", "layer", "bsi_rss", "bsi_sum", "auroc"]]
    for (left, right), (title, layers) in zip(axes, table.groupby("setting", sort=False), strict=True):
        x = layers.layer.to_numpy()
        for k, (key, label) in enumerate((("bsi_rss", "|Δμ| / √(σ₁² + σ₂²) (paper)"), ("bsi_sum", "|Δμ| / (σ₁ + σ₂) (code)"))):
            left.bar(x + 0.4 * (k - 0.5), layers[key], 0.4, color=(COLOURS[2], COLOURS[5])[k], label=label)
        left.axhline(tau, color=POISONED, lw=1, ls="--", label=f"τ = {tau:g}: above it a layer is sensitive")
        ticks = x if len(x) < 17 else x[::4]
        left.set(xlabel="layer", ylabel="separation", ylim=(0, max(1.15 * tau, left.get_ylim()[1])), xticks=ticks)
        left.set_title(title, fontsize=9)
        known = layers.dropna(subset="auroc")
        right.plot(known.layer, known.auroc.astype(float), color=CLEAN, marker="o")
        right.axhline(0.5, color="grey", lw=0.8, ls=":")
        right.set(xlabel="layer", ylabel="AUROC of low entropy", ylim=(0, 1.03), xticks=ticks)
        if known.empty:
            right.text(0.5, 0.5, "no poisoned samples", transform=right.transAxes, ha="center")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figures.with_numbers(figure, table)


def dose_response(points: pd.DataFrame):
    """ASR against the poisoned samples that are left for fine-tuning (`dose_points`): a line through the oracle's doses,
    marks for the rest."""
    rows = points.assign(label=points.label.mask(points.oracle, "oracle, by recall"), metric=points.setting)
    rows = rows.sort_values("oracle", ascending=False, kind="stable")
    figure = figures.lines(rows, "left", {setting: setting for setting in dict.fromkeys(points.setting)}, "label",
                           ticks={}, xscale="linear", xlabel="poisoned samples left", ylim=(-0.02, 1.05))
    for axis in figure.axes:
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(-0.2, 1.6 * max(1, points.left.max()))
    figure.axes[0].set_ylabel("ASR")
    return figure
