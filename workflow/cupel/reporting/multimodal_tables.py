"""Tables of the papers on multimodal models, from the tidy table and the filters' own records."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.files import read_json
from cupel.reporting import tables

VICTIM = "victim"
MAIN_RATE = 0.1  # of the paper, "unless otherwise stated"
SEVERAL = ("square", "dual", "multi")
KINDS = ("square", "random_position", "checkerboard", "blend", "sig", "wanet")
CLUSTERINGS = ("without_gmm", "without_gmm~nats", "two_means", "bye")
#: the paper's Figure 4: the filter without one or both of its parts
OWN = "BYE"  # how the sources of the paper's own numbers begin


@dataclass(frozen=True)
class Setting:
    """What victims of several seeds share."""

    dataset: str
    model: str
    recipe: str
    trigger: str
    rate: float

    def name(self, *keys: str) -> str:
        """Some of it, in words."""
        return ", ".join(f"{100 * self.rate:g} %" if key == "rate" else getattr(self, key) for key in keys)

    def same(self, other: "Setting", *keys: str) -> bool:
        """Whether two settings agree in some of it."""
        return all(getattr(self, key) == getattr(other, key) for key in keys)


class Numbers:
    """The tidy table of a paper, by setting, stage, method and metric; means over seeds.

    Args:
        own: rows of the paper.
        labels: names for people, by defence.
    """

    def __init__(self, own: pd.DataFrame, labels: dict[str, str]):
        named = tables.with_names(own, labels)
        named["trigger"] = [trigger_of(row) for row in named.itertuples()]
        self.rows, self.settings = {}, []
        for stage, part in named.groupby("stage", sort=False):
            for row in tables.summary(part).itertuples():
                setting = Setting(row.dataset, row.model, row.recipe, trigger_of(row), row.poison_rate)
                self.rows[setting, stage, row.method, row.metric] = row
        for row in named[named.stage == VICTIM].itertuples():
            setting = Setting(row.dataset, row.model, row.recipe, row.trigger, row.poison_rate)
            if setting not in self.settings:
                self.settings.append(setting)
        self.labels = {VICTIM: "no defence (vanilla)", **labels}

    def row(self, setting: Setting, stage: str, method: str, metric: str):
        """The row of a number, or None; of a job that failed for all filters at once, its own."""
        known = self.rows.get((setting, stage, method, metric))
        return known if known is not None or stage != "filtered" else self.rows.get((setting, stage, "", metric))

    def value(self, setting: Setting, stage: str, method: str, metric: str) -> float:
        """A number, NaN for none."""
        row = self.row(setting, stage, method, metric)
        return np.nan if row is None else row.value

    def text(self, setting: Setting, stage: str, method: str, metric: str, *, unit: str = "percent", interval=False) -> str:
        """A number for a table: percent, or as it is; `failed`; empty for none."""
        row = self.row(setting, stage, method, metric)
        if row is None or np.isnan(row.value):
            failed = row if row is not None else self.row(setting, stage, method, {"filtered": "f1"}.get(stage, "cp"))
            return "failed" if failed is not None and failed.failed else ""
        if unit == "number":
            return f"{row.value:g}" if row.value == int(row.value) else f"{row.value:.1f}"
        text = f"{100 * row.value:.1f}"
        return f"{text} ({100 * row.low:.1f} to {100 * row.high:.1f})" if interval and not np.isnan(row.low) else text

    def methods(self, stage: str, settings: list[Setting]) -> list[str]:
        """Methods with a number in these settings, in the order of experiment.yaml, without the sweep's."""
        found = {method for setting, at, method, _ in self.rows if at == stage and setting in settings}
        return [name for name in self.labels if name in found]


class Reported:
    """Published numbers (percent), by dataset, model, attack, rate, defence and metric; the paper's own come first."""

    def __init__(self, table: pd.DataFrame):
        table = table.assign(own=table.source.str.startswith(OWN)).sort_values("own", kind="stable")
        self.known = {(row.dataset, row.model, row.attack, row.poison_rate, row.defence, row.metric): row
                      for row in table.itertuples()}

    def text(self, setting: Setting, method: str, metric: str) -> str:
        """A published number in percent, with a dagger where it is not the paper's own; empty for none."""
        row = self.known.get((setting.dataset, setting.model, setting.trigger, setting.rate, method, metric))
        return "" if row is None else f"{row.value:g}" + ("" if row.own else " †")


def frame(rows: dict[str, dict], drop: bool = True) -> pd.DataFrame:
    """A wide table from row label to column to text; columns without any entry are left out."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    grid = pd.DataFrame([[row.get(column, "") for column in columns] for row in rows.values()], index=list(rows),
                        columns=pd.MultiIndex.from_tuples(columns) if columns and isinstance(columns[0], tuple) else columns)
    return grid.loc[:, [bool((grid.iloc[:, k] != "").any()) for k in range(grid.shape[1])]] if drop else grid


def main_settings(settings: list[Setting], attacks: dict[str, dict]) -> list[Setting]:
    """Of every data set and model its main victim: first recipe, first trigger of the file, at 10 % or the highest rate."""
    order, groups = list(attacks), {}
    for setting in settings:
        groups.setdefault((setting.dataset, setting.model), []).append(setting)
    return [min(group, key=lambda setting: (setting.recipe != group[0].recipe, order.index(setting.trigger),
                                            setting.rate != MAIN_RATE, -setting.rate)) for group in groups.values()]


def answers_table(numbers: Numbers, reported: Reported, settings: list[Setting]) -> pd.DataFrame:
    """Table 1: CP and ASR, a row per defence, columns per data set."""
    rows = {}
    for method in [VICTIM, *numbers.methods("purified", settings)]:
        stage = VICTIM if method == VICTIM else "purified"
        row = rows[numbers.labels[method]] = {}
        for setting in settings:
            row[setting.dataset, "CP"] = numbers.text(setting, stage, method, "cp")
            row[setting.dataset, "ASR"] = numbers.text(setting, stage, method, "asr")
            row[setting.dataset, "CP reported"] = reported.text(setting, method, "cp")
            row[setting.dataset, "ASR reported"] = reported.text(setting, method, "asr")
    return frame(rows)


def details_table(numbers: Numbers, settings: list[Setting]) -> pd.DataFrame:
    """Every way to score the answers, with intervals."""
    columns = {"cp": "CP", "cp_stripped": "CP, lenient", "cp_letter": "CP, letter", "asr": "ASR",
               "asr_contains": "ASR, contains", "cp_triggered": "right on triggered"}
    rows = {}
    for setting in settings:
        for method in [VICTIM, *numbers.methods("purified", [setting])]:
            stage = VICTIM if method == VICTIM else "purified"
            row = rows[f"{setting.name('dataset', 'model')}: {numbers.labels[method]}"] = {
                label: numbers.text(setting, stage, method, metric, interval=True) for metric, label in columns.items()}
            row["removed"] = numbers.text(setting, stage, method, "removed", unit="number")
            left = (setting, "filtered", "bye", "poisoned") if method == VICTIM else (setting, stage, method, "left")
            row["poison left"] = numbers.text(*left, unit="number")
    return frame(rows)


def detection_table(numbers: Numbers, reported: Reported, settings: list[Setting]) -> pd.DataFrame:
    """Table 2: what the filters find, without fitting again."""
    rows = {}
    for setting in settings:
        for method in numbers.methods("filtered", [setting]):
            row = rows[f"{setting.name('dataset', 'model')}: {numbers.labels[method]}"] = {}
            for metric in ("precision", "recall", "f1", "auroc"):
                name = metric.upper() if metric in ("f1", "auroc") else metric
                row[name] = numbers.text(setting, "filtered", method, metric, interval=metric in ("precision", "recall"))
            for metric, name in (("flagged", "removed"), ("left", "poison left"), ("samples", "of samples")):
                row[name] = numbers.text(setting, "filtered", method, metric, unit="number")
            row["clean removed"] = numbers.text(setting, "filtered", method, "false_alarm")
            for metric in ("precision", "recall", "f1"):
                row[f"{metric} reported".replace("f1", "F1")] = reported.text(setting, method, metric)
    return frame(rows)


def before_after(numbers: Numbers, setting: Setting) -> dict[str, str]:
    """CP and ASR of the victim, and of the model fitted again on what BYE leaves."""
    return {f"{metric.upper()} {word}": numbers.text(setting, stage, method, metric)
            for metric in ("cp", "asr") for word, stage, method in (("before", VICTIM, VICTIM), ("after", "purified", "bye"))}


def triggers_table(numbers: Numbers, reported: Reported, attacks: dict[str, dict], functions: tuple[str, ...],
                   mains: list[Setting]) -> pd.DataFrame | None:
    """Tables 3 and 6: BYE against several triggers; None with fewer than two of them."""
    settings = [setting for setting in numbers.settings if attacks[setting.trigger]["function"] in functions
                and any(setting.same(main, "dataset", "model", "recipe", "rate") for main in mains)]
    if len({setting.trigger for setting in settings}) < 2:
        return None
    settings.sort(key=lambda setting: list(attacks).index(setting.trigger))
    rows = {}
    for setting in settings:
        row = rows[f"{setting.name('dataset', 'model')}: {attacks[setting.trigger]['label']}"] = before_after(numbers, setting)
        for metric in ("precision", "recall", "f1", "auroc"):
            row[metric.upper() if metric in ("f1", "auroc") else metric] = numbers.text(setting, "filtered", "bye", metric)
        for metric in ("asr", "f1"):
            row[f"{metric.upper()} reported"] = reported.text(setting, "bye", metric)
    return frame(rows)


def data_table(used: list[str], data: str, numbers: Numbers, bases: list[dict], reported: pd.DataFrame) -> pd.DataFrame:
    """Table 4: sizes of what was used and of what the paper used, and the models that were built here."""
    rows = {}
    for name in used:
        manifest = read_json(Path(data) / name / "manifest.json")
        own = reported[reported.dataset == manifest["name"]]
        known = {metric: own[own.metric == metric].value for metric in ("n_train", "n_test")}
        row = rows[name] = {"task": manifest["task"], "metric": manifest["metric"],
                            "excerpt": "yes" if manifest["excerpt"] else ""}
        for split in ("train", "test"):
            row[split] = str(manifest["counts"][split])
            row[f"{split} reported"] = f"{known[f'n_{split}'].iloc[0]:g}" if len(known[f"n_{split}"]) else ""
        rates = {setting.rate for setting in numbers.settings if setting.dataset == name}
        row["poisoned"] = ", ".join(str(int(rate * manifest["counts"]["train"] + 1e-9)) for rate in sorted(rates))
        row["pretraining"] = str(manifest["counts"].get("pretrain", "")) or ""
        for base in (base for base in bases if base["dataset"] == name):
            row[f"{base['model']}: weights"] = f"{base['parameters']:,}"
            row[f"{base['model']}: CP before fine-tuning"] = f"{100 * base['cp']:.1f}"
    return frame(rows)


def tau_table(numbers: Numbers, reported: Reported, setting: Setting) -> pd.DataFrame:
    """Table 5: BYE at several thresholds of the layer test, by both formulas."""
    rows = {}
    sweep = {method.partition("~")[2] for at, stage, method, _ in numbers.rows
             if at == setting and stage == "filtered" and "_tau" in method}
    for tau in sorted({float(name.partition("_tau")[2]) for name in sweep}):
        row = rows[f"{tau:g}"] = {}
        for rule, title in (("sum", "σ₁ + σ₂ (code)"), ("rss", "√(σ₁² + σ₂²) (paper)")):
            method = f"bye~{rule}_tau{tau:g}"
            row[title, "layers"] = numbers.text(setting, "filtered", method, "sensitive_layers", unit="number")
            for metric in ("precision", "recall", "f1"):
                found = row[title, "layers"] != "0"
                row[title, metric.replace("f1", "F1")] = numbers.text(setting, "filtered", method, metric) if found else "–"
        row["reported", "F1"] = reported.text(setting, f"bye~tau{tau:g}", "f1")
    return frame(rows)


def clustering_table(numbers: Numbers, reported: Reported, settings: list[Setting]) -> pd.DataFrame:
    """Table 7: F1 by what divides the aggregated entropies."""
    rows = {}
    for method in CLUSTERINGS:
        if any(method in numbers.methods("filtered", [setting]) for setting in settings):
            row = rows[{"bye": "GMM (BYE)"}.get(method, numbers.labels[method])] = {}
            for setting in settings:
                row[setting.name("dataset", "model"), "F1"] = numbers.text(setting, "filtered", method, "f1")
                row[setting.name("dataset", "model"), "F1 reported"] = reported.text(setting, method, "f1")
    return frame(rows)


def hazards_table(records: list[tuple[Setting, int, dict]], labels: dict[str, str]) -> pd.DataFrame:
    """What BYE does where its assumptions fail: no sensitive layer, most removed, far tails removed, clean data flagged."""
    rows = {}
    for setting, seed, record in records:
        where = f"{setting.name('dataset', 'model', 'recipe', 'trigger', 'rate')}, seed {seed}"
        if "failed" in record:
            rows[where] = {"what it says": f"failed: {record['failed']}"}
            continue
        for name, entry in record["filters"].items():
            if entry["function"] != "bye":
                continue
            detected, hazards = entry["detection"], entry["hazards"]
            false = detected.get("false_alarm")
            rows[f"{where}: {labels[name]}"] = {
                "sensitive layers": ", ".join(map(str, entry["record"]["sensitive"])) or "none",
                "removed": f"{100 * hazards['share_flagged']:.1f} %",
                "clean removed": "" if false is None else f"{100 * false:.1f} %",
                "most removed": "YES" if hazards["majority_removed"] else "no",
                "removed above kept": "YES" if hazards["non_monotone"] else "no",
                "what it says": entry["record"]["message"],
            }
    return frame(rows)


def rates_table(numbers: Numbers, mains: list[Setting]) -> pd.DataFrame | None:
    """BYE by poison rate, 0 % among them; None with one rate."""
    metrics = (("sensitive_layers", "layers", "number"), ("false_alarm", "clean removed", "percent"),
               ("recall", "recall", "percent"), ("f1", "F1", "percent"))
    rows = {}
    for main in mains:
        settings = [setting for setting in numbers.settings if setting.same(main, "dataset", "model", "recipe", "trigger")]
        for setting in sorted(settings, key=lambda setting: setting.rate) if len(settings) > 1 else []:
            row = rows[setting.name("dataset", "model", "trigger", "rate")] = before_after(numbers, setting)
            for method, title in (("bye", "BYE"), ("bye~rss", "by the paper's formula")):
                row |= {f"{title}: {name}": numbers.text(setting, "filtered", method, metric, unit=unit)
                        for metric, name, unit in metrics}
    return frame(rows) if rows else None


def recipes_table(numbers: Numbers, mains: list[Setting]) -> pd.DataFrame | None:
    """The same victim by recipe (schedule); None with one recipe."""
    rows = {}
    for main in mains:
        settings = [setting for setting in numbers.settings if setting.same(main, "dataset", "model", "trigger", "rate")]
        for setting in settings if len(settings) > 1 else []:
            rows[setting.name("dataset", "model", "recipe")] = {
                **before_after(numbers, setting), "F1 of BYE": numbers.text(setting, "filtered", "bye", "f1")}
    return frame(rows) if rows else None


def trigger_of(row) -> str:
    """Name of a row's attack with its variant."""
    return row.attack + (f"~{row.attack_variant}" if row.attack_variant else "")
