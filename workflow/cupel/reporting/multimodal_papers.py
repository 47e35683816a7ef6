"""Tables, figures and claims of a paper on multimodal models, from the tidy table and the filters' own records."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.cells import read_tensors
from cupel.evaluation.claims import judge_all
from cupel.files import read_json, write_text
from cupel.reporting import figures, tables
from cupel.reporting import multimodal_figures as drawing
from cupel.reporting import multimodal_tables as made
from cupel.reporting.multimodal_tables import VICTIM, Numbers, Reported, Setting, trigger_of
from cupel.vision_language import prepared, triggers

SAME = ("dataset", "model", "recipe", "rate")
CURVES = 8  # victims in the figure of training


def filter_records(own: pd.DataFrame) -> list[tuple[Setting, int, dict, Path]]:
    """Setting, seed, account of the filters, and folder of every victim whose filters have run."""
    found = []
    for row in own[own.stage == "filtered"].drop_duplicates("path").itertuples():
        folder = Path(row.path)
        if (folder / "filters.json").is_file():
            setting = Setting(row.dataset, row.model, row.recipe, trigger_of(row), row.poison_rate)
            found.append((setting, row.seed, read_json(folder / "filters.json"), folder))
    return found


def report_paper(paper: str, scale: str, cells: pd.DataFrame, about: dict, claims: list[dict], reported: pd.DataFrame,
                 title: str, data: str, bases: list[str], out: str | Path) -> None:
    """Write `tables/`, `figures/` (with captions.json) and `claims.csv` of a paper.

    Args:
        paper: key.
        scale: name.
        cells: the tidy table, of all papers.
        about: `labels` of the defences, `attacks` (name to function, parameters, label), `datasets` (names), `target`.
        claims: entries of claims.yaml.
        reported: published numbers, see reported/.
        title: of the paper.
        data: folder of prepared data.
        bases: records of the models that were built.
        out: folder `results/<scale>/papers/<key>`.
    """
    out = Path(out)
    own = cells[cells.paper == paper]
    numbers, records = Numbers(own, about["labels"]), filter_records(own)
    mains = made.main_settings(numbers.settings, about["attacks"])
    write_tables(out / "tables", scale, title, numbers, reported, mains, records, about, data, bases)
    write_figures(out / "figures", own, numbers, mains, records, about, data)
    write_text(out / "claims.csv", judge_all(claims, own, paper, scale).to_csv(index=False))


# ------------------------------------------------------------------------------------------------------------------- tables


def write_tables(folder: Path, scale: str, title: str, numbers: Numbers, reported: pd.DataFrame, mains: list[Setting],
                 records: list, about: dict, data: str, bases: list[str]) -> None:
    """Every table that the cells are enough for; see `report_paper`."""
    published, attacks = Reported(reported), about["attacks"]
    place = f"scale {scale}, mean over {len({seed for _, seed, _, _ in records})} seed(s)"

    def write(stem: str, grid: pd.DataFrame | None, index: str, caption: str) -> None:
        if grid is not None and grid.size:
            tables.write_table(grid, folder / stem, caption, index=index)

    def triggers_of(settings: list[Setting]) -> str:
        return ", ".join(dict.fromkeys(f"{attacks[s.trigger]['label']} at {s.name('rate')}" for s in settings))

    for model in dict.fromkeys(setting.model for setting in mains):
        part = [setting for setting in mains if setting.model == model]
        write(f"table1_cp_asr_{model}", made.answers_table(numbers, published, part), "defence",
              f"{title}. Table 1: CP and ASR in percent, {model}, {triggers_of(part)}, {place}. CP: share of right answers on "
              f"untouched test samples (captions: CIDEr-D × 100); ASR: share of all triggered test samples answered with "
              f"“{about['target']}”. Both exact, case ignored.")
    write("table1_details", made.details_table(numbers, mains), "setting: defence",
          f"Table 1 in detail: every way to score the answers, in percent with 95 % intervals, {place}. “Contains”: the target "
          "anywhere in the answer; “right on triggered”: the true answer to a triggered picture.")
    write("table2_detection", made.detection_table(numbers, published, mains), "setting: filter",
          f"Table 2: poisoned samples found among the training samples, in percent, {triggers_of(mains)}, {place}. No model is "
          "fitted again for this. AUROC is of what the filter looks at, and absent where it looks at nothing (random, oracle, "
          "no sensitive layer).")
    dagger = "Reported numbers with † are of third parties."
    write("table3_several_squares", made.triggers_table(numbers, published, attacks, made.SEVERAL, mains), "setting: trigger",
          f"Table 3: several squares, in percent, {place}. {dagger}")
    built = [read_json(path) for path in bases]
    write("table4_data", made.data_table(list(about["datasets"]), data, numbers, built, reported), "data",
          f"Table 4: number of samples, and the models that were built here; scale {scale}.")
    for setting in mains:
        write("table5_tau" if len(mains) == 1 else f"table5_tau_{setting.dataset}_{setting.model}",
              made.tau_table(numbers, published, setting), "τ",
              f"Table 5: threshold τ of the layer test on {setting.name('dataset', 'model', 'trigger', 'rate')}, {place}. "
              "Number of sensitive layers and detection in percent, by the code's and by the paper's formula; – where none "
              "passes.")
    write("table6_triggers", made.triggers_table(numbers, published, attacks, made.KINDS, mains), "setting: trigger",
          f"Table 6: kinds of trigger, in percent, {place}. Blend, SIG and WaNet are not in the paper. {dagger}")
    write("table7_clustering", made.clustering_table(numbers, published, mains), "division",
          f"Table 7: F1 in percent by what divides the entropies of the sensitive layers, {place}.")
    write("table8_hazards", made.hazards_table([record[:3] for record in records], about["labels"]), "victim: filter",
          "Hazards: BYE on every victim. Without a sensitive layer nothing is flagged. “Most removed”: more than half of the "
          "training set; “removed above kept”: some removed sample has a higher aggregated entropy than one that is kept.")
    write("table9_rates", made.rates_table(numbers, mains), "setting",
          f"By poison rate, in percent, {place}. At 0 % every removed sample is a false alarm.")
    write("table9_recipes", made.recipes_table(numbers, mains), "setting",
          f"By recipe of fine-tuning, in percent, {place}.")


# ------------------------------------------------------------------------------------------------------------------ figures


def dose_points(numbers: Numbers, settings: list[Setting]) -> pd.DataFrame:
    """ASR and poisoned samples left, of victims and of refits by any filter: the points of `dose_response`."""
    rows = []
    for setting in settings:
        total = numbers.value(setting, "filtered", "bye", "poisoned")
        for method in [VICTIM, *numbers.methods("purified", [setting])]:
            stage = VICTIM if method == VICTIM else "purified"
            asr = numbers.row(setting, stage, method, "asr")
            left = total if method == VICTIM else numbers.value(setting, stage, method, "left")
            if asr is not None and not np.isnan(asr.value + left):
                rows.append({"setting": setting.name("dataset", "model"), "label": numbers.labels[method],
                             "oracle": method == VICTIM or method.partition("~")[0] == "oracle", "left": left,
                             "asr": asr.value, "asr_low": asr.low, "asr_high": asr.high})
    return pd.DataFrame(rows, columns=["setting", "label", "oracle", "left", "asr", "asr_low", "asr_high"])


def histogram_panels(folder: Path, record: dict, labels: dict[str, str], most: int = 8) -> list[dict]:
    """Panels for `entropy_histograms`: what BYE and its variants decide on, and the layers with the largest separation."""
    table = pd.read_parquet(folder / "entropies.parquet")
    values = table[[f"layer_{k}" for k in range(len(table.columns) - 1)]].to_numpy(np.float64)
    poisoned = np.zeros(len(values), bool)
    poisoned[record["poisoned"]] = True
    panels = []
    for name, entry in record["filters"].items():
        if entry["function"] == "bye" and entry["record"]["sensitive"]:
            layers = entry["record"]["sensitive"]
            panels.append({"title": f"{labels[name]}:\nmean of {len(layers)} sensitive layer(s)", "poisoned": poisoned,
                           "values": values[:, layers].mean(1), "mixture": entry["record"]["aggregated"]})
    chosen = sorted(record["layers"], key=lambda layer: -layer["bsi_sum"])[:most]
    panels += [{"title": f"layer {layer['layer']}\nseparation {layer['bsi_rss']:.2f} (paper), {layer['bsi_sum']:.2f} (code)",
                "values": values[:, layer["layer"]], "poisoned": poisoned, "mixture": layer}
               for layer in record["layers"] if layer in chosen]
    return panels


def map_rows(folder: Path, count: int, title: str = "") -> list[dict]:
    """Rows for `attention_maps`: some test pictures without and with the trigger; with a title, the triggered ones alone."""
    found = read_tensors(folder / "maps.npz")
    if not found:
        return []
    return [{"title": title or word, "picture": np.moveaxis(found["pictures"][side, k], 0, -1), "maps": found["maps"][side, k],
             "trigger": bool(side)}
            for k in range(min(count, found["maps"].shape[1]))
            for side, word in enumerate(("clean", "triggered")) if side or not title]


def trigger_sheet(name: str, data: str, attacks: dict[str, dict], used: list[str], count: int = 5):
    """The triggers on test pictures, those of the grid first; None where the pictures differ in size."""
    samples = prepared.load(f"{data}/{name}", "test")
    firsts: dict[str, int] = {}
    for k, record in enumerate(samples.records):
        firsts.setdefault(record["image"], k)
    chosen = list(firsts.values())[:count]
    clean = [samples.image(k) for k in chosen]
    if len({picture.shape for picture in clean}) > 1:
        return None
    stamped = {}
    # of those that are not run, the plain ones
    for attack in [*used, *(attack for attack in attacks if attack not in used and "~" not in attack)]:
        entry = attacks[attack]
        stamped[entry["label"] + ("" if attack in used else " (not run)")] = np.stack([
            triggers.stamp(entry["function"], picture, 0, samples[k]["id"], **entry["parameters"])
            for k, picture in zip(chosen, clean, strict=True)])
    return drawing.trigger_sheet(np.stack(clean), stamped)


def write_figures(folder: Path, own: pd.DataFrame, numbers: Numbers, mains: list[Setting], records: list, about: dict,
                  data: str) -> None:
    """Every picture that the cells are enough for, and `captions.json` in the order in which they are shown."""
    captions: dict[str, str] = {}

    def save(stem: str, figure, caption: str) -> None:
        figures.save(figure, folder / f"{stem}.png")
        captions[stem] = caption

    looked: dict[Setting, tuple[dict, Path]] = {}
    for setting, _, record, path in records:
        if "failed" not in record:
            looked.setdefault(setting, (record, path))
    for main in (main for main in mains if main in looked):
        _victim_figures(save, main, looked, about)
    _comparison_figures(save, numbers, mains)
    histories = {}
    for row in own[own.stage == VICTIM].drop_duplicates("path").itertuples():
        if row.status == "ok" and len(histories) < CURVES:
            name = f"{row.dataset} {trigger_of(row)} {100 * row.poison_rate:g} %, seed {row.seed}"
            histories[name] = pd.read_csv(Path(row.path) / "history.csv")
    if histories:
        save("training", figures.training_curves(histories), "Fine-tuning of the victims: loss per answer token, and share of "
             "answer tokens right on clean and on poisoned samples.")
    used = {setting.trigger for setting in numbers.settings}
    for name in about["datasets"]:
        sheet = trigger_sheet(name, data, about["attacks"], [attack for attack in about["attacks"] if attack in used])
        if sheet is not None:
            save(f"triggers_{name}", sheet, f"Triggers on test pictures of {name}; last, the difference to the untouched "
                 "picture, ten times amplified around grey.")
    # not sorted: they are shown in this order
    write_text(folder / "captions.json", json.dumps(captions, indent=1, ensure_ascii=False) + "\n")


def _victim_figures(save: Callable, main: Setting, looked: dict[Setting, tuple[dict, Path]], about: dict) -> None:
    """What is seen inside a main victim."""
    record, path = looked[main]
    where, stem = main.name("dataset", "model"), f"{main.dataset}_{main.model}"
    layers = drawing.shown_layers(len(record["layers"]))
    rows = map_rows(path, 2)
    if rows:
        save(f"maps_{stem}", drawing.attention_maps(rows, layers), "Attention from the last prompt position to the picture, "
             f"head mean, by layer ({where}). Each map has its own scale; its entropy H in nats stands below, blue for "
             "untouched and orange for triggered test pictures.")
    others = [setting for setting in looked if setting != main and setting.same(main, *SAME)]
    rows = [row for setting in (main, *others)
            for row in map_rows(looked[setting][1], 1, about["attacks"][setting.trigger]["label"])]
    if others and rows:
        save(f"responses_{stem}", drawing.attention_maps(rows, layers), f"Responses of attention to every trigger ({where}).")
    save(f"entropies_{stem}", drawing.entropy_histograms(histogram_panels(path, record, about["labels"])),
         f"Entropies of the training samples ({main.name('dataset', 'model', 'trigger', 'rate')}) with the fitted mixture: "
         "first what BYE decides on, where a layer is sensitive, then single layers. Colours are the truth, unseen by filters.")
    twins = [setting for setting in looked if setting.same(main, "dataset", "model", "recipe") and not setting.rate]
    shown = {setting.name("trigger", "rate"): looked[setting][0]["layers"] for setting in dict.fromkeys((main, *twins))}
    save(f"layers_{stem}", drawing.layer_separation(shown, 2.0), "Separation of the two components in every layer, by both "
         f"formulas, and how well low entropy tells poisoned samples ({where}).")


def _comparison_figures(save: Callable, numbers: Numbers, mains: list[Setting]) -> None:
    """Filters beside each other."""
    points = [{"setting": setting.name("dataset", "model"), "label": numbers.labels[method], "metric": metric,
               "value": numbers.value(setting, "filtered", method, metric)}
              for setting in mains for method in numbers.methods("filtered", [setting])
              for metric in ("f1", "precision", "recall")]
    if points:
        order = [numbers.labels[name] for name in numbers.methods("filtered", mains)]
        save("f1", drawing.f1_bars(pd.DataFrame(points), order), "F1, precision and recall of every filter. The "
             "paper's ablation (Fig. 4) is BYE, without GMM, without BSI, and without both.")
    doses = dose_points(numbers, mains)
    if (doses[doses.oracle].groupby("setting").size() > 1).any():
        save("dose", drawing.dose_response(doses), "Dose and response: ASR against the number of poisoned samples left for "
             "fine-tuning. The line goes through the oracle's doses and the victim; marks are other filters.")
