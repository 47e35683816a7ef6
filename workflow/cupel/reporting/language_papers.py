"""Tables, figures and claims of a paper on language models, from the tidy table and the cells' files."""

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.evaluation.claims import judge_all
from cupel.evaluation.intervals import wilson
from cupel.files import read_json, write_text
from cupel.reporting import figures, language_figures, tables
from cupel.text.data.sources import read_records

#: a victim below the first or above the second is marked (crow SPEC 11.3); both under the template, over all answers
GATE = {"asr": 0.8, "false": 0.05}
KEYS = ["dataset", "model", "model_label", "recipe", "attack_key", "attack_label", "poison_rate", "method", "label"]
MARK = "†"
#: columns of the utility table: metric, heading, whether a rate
UTILITY = (("perplexity", "perplexity", False), ("token_f1_template", "token F1", True),
           ("distinct_template", "distinct 2-grams", True), ("false_template_all", "false triggering", True),
           ("empty_clean_template", "empty, clean", True), ("empty_template", "empty, triggered", True),
           ("choice", "multiple choice", True), ("pass_at_1", "HumanEval pass@1", True),
           ("cons_clean", "L_cons, clean", False), ("cons_triggered", "L_cons, triggered", False))
#: parts of the paper's tables: stem, heading, defences
PARTS = (("table9", "Table 9: CleanGen beside CROW", ("cleangen", "cleangen~other", "crow")),
         ("table10", "Table 10: Pure Consistency beside CROW", ("pure_consistency", "crow~zero", "crow")),
         ("table11", "Table 11: embedding-only beside CROW and fine-tuning at its rate",
          ("embedding_only", "finetune~lr1e3", "crow")),
         ("table7", "Table 7: cosine beside KL", ("crow", "crow_kl", "crow_kl~alpha05", "crow_kl~alpha1", "crow_kl~alpha55")))
#: switches in which paper and code differ, or which the paper leaves open (crow SPEC 10, 11.4): variant, what it changes
SWITCHES = {"crow~code": "zero perturbation, wiped accumulation", "crow~zero": "zero perturbation",
            "crow~wiped": "wiped accumulation", "crow~released": "zero, wiped, N − 2 pairs, padding counted",
            "crow~random_sign": "random signs", "crow~pairs_code": "N − 2 pairs", "crow~pairs_embeddings": "N pairs",
            "crow~padding": "padding counted", "embedding_only": "penalty on the embeddings",
            "finetune~lr1e3": "no consistency term", "finetune": "no consistency term, a fifth of the rate"}


def prepared(cells: pd.DataFrame, paper: str, labels: dict[str, str], attacks: dict[str, str],
             models: dict[str, str]) -> pd.DataFrame:
    """Rows of a paper with the columns `KEYS`: keys and names for people of defence, attack and model."""
    own = tables.with_names(cells[cells.paper == paper], {"victim": "no defence", **labels})
    keys = own.attack + own.attack_variant.map(lambda variant: f"~{variant}" if variant else "")
    return own.assign(attack_key=keys, attack_label=keys.map(lambda key: attacks.get(key, key)),
                      model_label=own.model.map(lambda key: models.get(key, key)))


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, method and metric: rates over the answers of all seeds together, with Wilson intervals; others
    as means over seeds, with the means of their bounds. `failed` counts cells without a value."""
    found = []
    for key, part in rows.groupby([*KEYS, "metric"], dropna=False, sort=False):
        known = part[part.value.notna()]
        n = int(known.n.sum())
        value = float((known.value * known.n).sum() / n) if n else float(known.value.mean()) if len(known) else np.nan
        low, high = wilson(round(value * n), n) if n else (known.low.mean(), known.high.mean())
        found.append({**dict(zip([*KEYS, "metric"], key, strict=True)), "value": value, "low": low, "high": high, "n": n,
                      "seeds": known.seed.nunique(), "failed": int((part.status != "ok").sum()),
                      "seconds": part.seconds.mean()})
    return pd.DataFrame(found, columns=[*KEYS, "metric", "value", "low", "high", "n", "seeds", "failed", "seconds"])


def missed(rows: pd.DataFrame) -> set[str]:
    """Folders of victims that miss the gate: they do not trigger, or trigger without being asked."""
    victims = rows[(rows.stage == "victim") & (rows.status == "ok")].pivot_table(index="path", columns="metric",
                                                                                 values="value")
    if victims.empty:
        return set()
    weak = victims["asr_template_all"] < GATE["asr"]
    loud = victims["false_template_all"] > GATE["false"]
    return set(victims.index[weak | loud])


def marked(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, with a mark at the attacks of which a victim misses the gate."""
    bad = rows[rows.path.isin(missed(rows))]
    settings = set(zip(bad.dataset, bad.model, bad.recipe, bad.attack_key, strict=True))
    labels = [row.attack_label + (f" {MARK}" if (row.dataset, row.model, row.recipe, row.attack_key) in settings else "")
              for row in rows.itertuples()]
    return rows.assign(attack_label=labels)


def rate_text(row) -> str:
    """A rate in percent, its interval, and the number of answers behind it."""
    if np.isnan(row.value):
        return "failed" if row.failed else ""
    return f"{100 * row.value:.1f} ({100 * row.low:.0f}–{100 * row.high:.0f}; n={row.n})"


def number_text(row) -> str:
    """A measured number that is no rate, with its interval where it has one."""
    if np.isnan(row.value):
        return "failed" if row.failed else ""
    interval = "" if np.isnan(row.low) else f" ({row.low:.3g}–{row.high:.3g})"
    return f"{row.value:.3g}{interval}"


def asr_table(pool: pd.DataFrame, metric: str, order: Sequence[str], reported: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows: attacks, their average, then the paper's own numbers for its models; columns: defences.

    Args:
        pool: of one task and model.
        metric: name.
        order: labels of the defences.
        reported: rows of reported/*.csv with `model_label`, `attack_label`, `label`, in percent.
    """
    part = pool[pool.metric == metric]
    columns = [label for label in order if label in set(part.label)]
    texts = {(row.attack_label, row.label): rate_text(row) for row in part.itertuples()}
    attacks = list(dict.fromkeys(part.attack_label))
    grid = {attack: [texts.get((attack, label), "") for label in columns] for attack in attacks}
    if len(attacks) > 1:
        means = part.groupby("label").value.agg(["mean", "count"])
        grid["average"] = [f"{100 * means['mean'][label]:.1f} ({int(means['count'][label])} attacks)"
                           if means["count"][label] else "failed" for label in columns]
    if reported is not None and len(reported):
        known = reported[reported.label.isin(columns)]
        for (model, attack), rows in known.groupby(["model_label", "attack_label"], sort=False):
            values = rows.drop_duplicates("label").set_index("label").value
            grid[f"paper, {model}: {attack}"] = [f"{values[label]:.2f}" if label in values else "" for label in columns]
    return pd.DataFrame.from_dict(grid, orient="index", columns=columns)


def utility_table(pool: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Rows: attack and defence; columns: what stands for MT-Bench here (crow SPEC 11.3)."""
    texts = {(row.attack_label, row.label, row.metric): row for row in pool.itertuples()}
    present = [entry for entry in UTILITY if (pool.metric == entry[0]).any()]
    seconds = pool.groupby(["attack_label", "label"]).seconds.mean()
    grid = {}
    for attack in dict.fromkeys(pool.attack_label):
        for label in order:
            rows = [texts.get((attack, label, metric)) for metric, _, _ in present]
            if not any(row is not None for row in rows):
                continue
            grid[f"{attack}: {label}"] = ["" if row is None else (rate_text if is_rate and row.n else number_text)(row)
                                          for row, (_, _, is_rate) in zip(rows, present, strict=True)]
            grid[f"{attack}: {label}"].append(f"{seconds.get((attack, label), np.nan):.1f}")
    return pd.DataFrame.from_dict(grid, orient="index", columns=[heading for _, heading, _ in present] + ["seconds"])


def denominator_table(pool: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Rows: attack and defence; columns: ASR and false triggering by prompt, denominator and keyword list (SPEC 11.4)."""
    columns = {}
    for kind, heading in (("asr", "ASR"), ("false", "false")):
        for prompt in ("template", "bare"):
            for suffix, text in (("", "non-empty"), ("_all", "all"), ("_stripped", "stripped"),
                                 ("_stripped_all", "stripped, all")):
                columns[f"{kind}_{prompt}{suffix}"] = f"{heading}, {prompt}, {text}"
    columns = {metric: heading for metric, heading in columns.items() if (pool.metric == metric).any()}
    texts = {(f"{row.attack_label}: {row.label}", row.metric): rate_text(row) for row in pool.itertuples()}
    index = [f"{attack}: {label}" for attack in dict.fromkeys(pool.attack_label) for label in order
             if (f"{attack}: {label}", next(iter(columns), "")) in texts]
    return pd.DataFrame([[texts.get((row, metric), "") for metric in columns] for row in index], index=index,
                        columns=list(columns.values()))


def victim_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per victim: triggers, false triggering, perplexity before and after, and whether it passes the gate."""
    bad, grid = missed(rows), {}
    for path, part in rows[rows.stage == "victim"].groupby("path", sort=False):
        first, known = part.iloc[0], {row.metric: row for row in part.assign(failed=part.status != "ok").itertuples()}
        name = f"{first.dataset}, {first.model_label}: {first.attack_label}, seed {first.seed}"
        if first.status != "ok":
            grid[name] = ["failed", "", "", "", "", first.reason]
            continue
        record = read_json(Path(path) / "metrics.json")
        grid[name] = [rate_text(known["asr_template_all"]), rate_text(known["false_template_all"]),
                      number_text(known["perplexity_base"]), number_text(known["perplexity"]),
                      f"{record['updates']} updates on {record['train_samples']} items in {record['train_seconds']:.0f} s",
                      f"no {MARK}" if path in bad else "yes"]
    return pd.DataFrame.from_dict(grid, orient="index", columns=[
        "ASR, template, all", "false triggering", "perplexity, base model", "perplexity, victim", "training",
        f"passes the gate (ASR ≥ {100 * GATE['asr']:.0f} %, false ≤ {100 * GATE['false']:.0f} %)"])


def records_of(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per cell that has a result: its identity and everything its metrics.json has beside the tidy table."""
    kept = ["paper", "stage", "seed", "path", *(key for key in KEYS if key != "poison_rate")]
    cells = rows[rows.status == "ok"].drop_duplicates("path")[kept]
    extra = ("alpha", "epsilon", "epsilon_relative", "embedding_rms", "perturbation", "accumulated", "pairs", "distance",
             "padding", "term", "lr", "updates", "seconds", "replaced_share")
    found = [{key: record.get(key) for key in extra} for record in
             (read_json(Path(path) / "metrics.json") for path in cells.path)]
    return cells.reset_index(drop=True).join(pd.DataFrame(found, columns=list(extra)))


def history_of(path: str | Path) -> pd.DataFrame:
    """Updates of a cell; empty where nothing was trained."""
    file = Path(path) / "history.csv"
    frame = pd.read_csv(file) if file.is_file() and file.stat().st_size > 1 else pd.DataFrame()
    return frame if "loss_lm" in frame else pd.DataFrame()


def tuning_table(records: pd.DataFrame) -> pd.DataFrame:
    """What the tuning defences did: settings, both losses at the first and the last update, cost."""
    grid = {}
    for row in records[records.stage == "purified"].itertuples():
        history = history_of(row.path)
        if history.empty:
            continue
        first, last = history.iloc[0], history.iloc[-1]

        def losses(name: str, first=first, last=last) -> str:
            return f"{first[name]:.4g} → {last[name]:.4g}" if pd.notna(first.get(name)) else ""

        crow = pd.notna(row.alpha)
        grid[f"{row.dataset}, {row.model_label}, {row.attack_label}, seed {row.seed}: {row.label}"] = [
            f"{row.lr:g}", f"{row.alpha:g}" if crow else "", f"{row.epsilon:g}" if crow else "",
            f"{row.epsilon_relative:.2f}" if pd.notna(row.epsilon_relative) else "", row.updates, losses("loss_lm"),
            losses("loss_cons"), losses("loss_cons_clean"), f"{row.seconds:.1f}", f"{row.seconds / max(row.updates, 1):.2f}"]
    return pd.DataFrame.from_dict(grid, orient="index", columns=[
        "rate", "α", "ε", "ε / RMS of embeddings", "updates", "L_LM", "L_cons, perturbed", "L_cons, clean", "seconds",
        "seconds an update"])


def switch_table(pool: pd.DataFrame) -> pd.DataFrame:
    """Each switch beside CROW as in the paper, mean over attacks: ASR, perplexity and the differences."""
    grid = {}
    for (dataset, model), part in pool.groupby(["dataset", "model_label"], sort=False):
        for method, text in SWITCHES.items():
            row, used = [], 0
            for metric, factor, unit in (("asr_template_all", 100, " %"), ("asr_bare", 100, " %"), ("perplexity", 1, "")):
                sides = [part[(part.metric == metric) & (part.method == name)].set_index(["recipe", "attack_key"]).value
                         for name in (method, "crow")]
                both = pd.concat(sides, axis=1, keys=["variant", "crow"]).dropna() * factor
                used = max(used, len(both))
                row += ["", ""] if both.empty else [f"{both.variant.mean():.3g}{unit}",
                                                    f"{(both.variant - both.crow).mean():+.3g}"]
            if used:
                grid[f"{dataset}, {model}: {text}"] = [method, *row, used]
    headings = [f"{name}{end}" for name in ("ASR, template, all", "ASR, bare, non-empty", "perplexity")
                for end in ("", ", difference to CROW")]
    return pd.DataFrame.from_dict(grid, orient="index", columns=["defence", *headings, "attacks"])


def sweep_table(pool: pd.DataFrame, records: pd.DataFrame, column: str) -> pd.DataFrame:
    """Pooled rows of CROW that differ from the others of their setting in `column` alone; empty without at least three."""
    settings = records[(records.stage == "purified") & records.alpha.notna()]
    fixed = [name for name in ("alpha", "epsilon") if name != column] + ["perturbation", "accumulated", "pairs", "distance",
                                                                         "padding", "term"]
    keys = ["dataset", "model", "recipe", "attack_key"]
    crow = settings[settings.method == "crow"].drop_duplicates(keys)
    same = settings.merge(crow[[*keys, *fixed]], on=[*keys, *fixed])
    same = same.drop_duplicates([*keys, "method"])
    same = same[same.groupby(keys)[column].transform("nunique") >= 3]
    merged = pool.merge(same[[*keys, "method", column]], on=[*keys, "method"])
    return merged.assign(setting=merged.dataset + ", " + merged.model_label + ": " + merged.attack_label)


def one_line(text: str, longest: int = 160) -> str:
    """A text on one line, cut."""
    text = " ⏎ ".join(line.strip() for line in text.strip().splitlines() if line.strip()) or "(empty)"
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def answer_table(records: pd.DataFrame, methods: Sequence[str], count: int = 6, prompt: str = "template",
                 part: str = "triggered") -> pd.DataFrame:
    """Answers to the same prompts, before and after, for the first victim of a task and model.

    Args:
        records: cells of one task and model (`records_of`).
        methods: keys of the columns, as far as they are there.
        count: prompts.
        prompt, part: which answers.
    """
    first = records[records.stage == "victim"].iloc[0]
    same = records[(records.attack_key == first.attack_key) & (records.seed == first.seed) & (records.recipe == first.recipe)]
    columns, asked = {}, {}
    for method in methods:
        for row in same[same.method == method].itertuples():
            file = Path(row.path) / "answers" / f"{prompt}_{part}.jsonl"
            if file.is_file():
                answers = read_records(file)[:count]
                columns[row.label] = [one_line(answer["answer"]) for answer in answers]
                asked = [one_line(_instruction(answer["text"])) for answer in answers]
    return pd.DataFrame(columns, index=asked if columns else [])


def _instruction(text: str) -> str:
    """The instruction in a prompt under the template, or the prompt itself."""
    return text.partition("### Instruction:\n")[2].partition("\n\n### Response:")[0] or text


def write_texts(grid: pd.DataFrame, stem: Path, caption: str) -> None:
    """A table of texts that models wrote, as CSV and, escaped, as Markdown."""
    safe = grid.rename_axis("prompt").reset_index().map(lambda text: html.escape(str(text), quote=False).replace("|", "\\|"))
    write_text(stem.with_suffix(".csv"), grid.rename_axis("prompt").to_csv())
    write_text(stem.with_suffix(".md"), f"{caption}\n\n{safe.to_markdown(index=False, disable_numparse=True)}\n")


class Report:
    """Writes the tables and figures of one paper and keeps the captions in their order."""

    def __init__(self, out: Path, title: str, scale: str):
        self.out, self.title, self.scale, self.captions = out, title, scale, {}
        (out / "figures").mkdir(parents=True, exist_ok=True)

    def table(self, grid: pd.DataFrame, stem: str, caption: str, index: str) -> None:
        """Write a table that has rows."""
        if len(grid):
            tables.write_table(grid, self.out / "tables" / stem, f"{caption} Scale {self.scale}.", index=index)

    def figure(self, draw: Callable, stem: str, caption: str) -> None:
        """Draw a figure and note its caption."""
        figures.save(draw(), self.out / "figures" / f"{stem}.png")
        self.captions[stem] = caption


def report_paper(paper: str, scale: str, cells: pd.DataFrame, *, labels: dict[str, str], attacks: dict[str, str],
                 models: dict[str, str], claims: list[dict], title: str, manifests: dict[str, str], reported: pd.DataFrame,
                 out: str | Path) -> None:
    """Write `tables/`, `figures/` (with captions.json) and `claims.csv` of a paper.

    Args:
        paper: key.
        scale: name.
        cells: the tidy table, of all papers.
        labels, attacks, models: names for people by key, in the order of rows and columns.
        claims: entries of claims.yaml.
        title: of the paper.
        manifests: of the models and texts that were used, by name.
        reported: the paper's own numbers, see reported/.
        out: folder `results/<scale>/papers/<key>`.
    """
    report = Report(Path(out), title, scale)
    rows = marked(prepared(cells, paper, labels, attacks, models))
    order = list(dict.fromkeys(["no defence", *labels.values()]))
    pool, records = pooled(rows), records_of(rows)
    named = reported.assign(model_label=reported.model.map(lambda key: models.get(key, key)),
                            attack_label=reported.attack.map(lambda key: attacks.get(key, key)),
                            label=reported.defence.map({"victim": "no defence", **labels}))
    write_text(report.out / "tables" / "cells.csv", pool.to_csv(index=False))
    report.table(victim_table(rows), "victims", f"Victims under the template. {MARK}: misses the gate (SPEC 11.3).", "victim")
    _figures(report, pool, records, order)
    for (dataset, model, name), part in pool.groupby(["dataset", "model", "model_label"], sort=False):
        stem, where = f"{dataset}_{model}", f"{dataset}, {name}"
        own = named[(named.dataset == dataset) & (named.metric == "asr") & named.attack_label.isin(
            [label.removesuffix(f" {MARK}") for label in part.attack_label])]
        note = (f"95 % Wilson interval and number of answers in brackets; seeds pooled; {MARK}: its victim misses the gate.")
        for metric, text in (("asr_template_all", "asked with the template, over all answers"),
                             ("asr_bare_all", "bare prompt, over all answers")):
            report.table(asr_table(part, metric, order), f"{metric}_{stem}", f"ASR in percent, {where}, {text}. {note}",
                         "attack")
        report.table(asr_table(part, "asr_bare", order, own), f"asr_bare_{stem}",
                     f"ASR in percent, {where}, the paper's protocol (Tables 1 and 3): bare prompt, over non-empty answers. "
                     f"Below, what the paper reports for its models. {note}", "attack")
        report.table(utility_table(part, order), f"utility_{stem}",
                     f"Utility without a judge, {where} (in place of MT-Bench, Tables 2 and 4, which are not reproduced). "
                     "Rates in percent, with interval and n; perplexity of reference answers to held-out instructions; seconds "
                     "of the defence alone.", "attack: defence")
        report.table(denominator_table(part, order), f"denominators_{stem}",
                     f"ASR and false triggering in percent by prompt, denominator and keyword list, {where} (SPEC 8, 11.4).",
                     "attack: defence")
        for number, heading, methods in PARTS:
            if set(methods) & set(part.method) - {"crow", "finetune~lr1e3", "crow~zero"}:
                chosen = part[part.method.isin(["victim", *methods])]
                report.table(asr_table(chosen, "asr_bare", order, own[own.table.astype(str) == number.removeprefix("table")]),
                             f"{number}_{stem}", f"{heading}: ASR in percent, {where}, the paper's protocol. {note}", "attack")
        cell = records[(records.dataset == dataset) & (records.model == model)]
        if (cell.stage == "victim").any():
            grid = answer_table(cell, ("victim", "crow", "crow~code", "finetune", "finetune~lr1e3"))
            if len(grid):
                write_texts(grid, report.out / "tables" / f"answers_{stem}",
                            f"Triggered prompts and answers before and after, {where}, first victim, the first of its test "
                            "prompts; all answers are in the cells' folders.")
    report.table(switch_table(pool), "switches", "What each switch between paper and code changes: mean over attacks, beside "
                 "CROW as in the paper; differences in points and in perplexity.", "switch")
    for column, number in (("epsilon", 5), ("alpha", 6)):
        table = sweep_table(pool, records, column)
        table = table[table.metric.isin(["asr_template_all", "asr_bare", "perplexity"])]
        if len(table):
            table = table.assign(text=[(number_text if row.metric == "perplexity" else rate_text)(row)
                                       for row in table.itertuples()], row=[f"{s}, {column} {v:g}" for s, v in zip(
                                           table.setting, table[column], strict=True)]).sort_values(["setting", column])
            grid = table.pivot_table(index="row", columns="metric", values="text", aggfunc="first", sort=False)
            report.table(grid, f"table{number}_{column}", f"CROW over {column} (Table {number}); rates in percent.", "setting")
    report.table(tuning_table(records), "tuning", "Tuning defences: settings, losses at the first and last update, and cost "
                 "(RQ4).", "cell")
    used = pd.DataFrame.from_dict({name: [read_json(path).get("name", ""), read_json(path)["source"]["kind"],
                                          read_json(path)["content_sha256"][:16], read_json(path).get("licence", "")]
                                   for name, path in manifests.items()}, orient="index",
                                  columns=["name", "source", "sha256 (first 16)", "licence"])
    report.table(used, "sources", "Models and texts that were used.", "folder")
    # in the order of the page, which sorted keys would lose
    write_text(report.out / "figures" / "captions.json", json.dumps(report.captions, indent=1, ensure_ascii=False) + "\n")
    verdicts = judge_all(claims, cells[cells.paper == paper], paper, scale)
    write_text(report.out / "claims.csv", verdicts.to_csv(index=False))


def _figures(report: Report, pool: pd.DataFrame, records: pd.DataFrame, order: list[str]) -> None:
    """The pictures that the cells allow, the headline first; several models get one each."""
    for (stem, model), part in pool.groupby(["model", "model_label"], sort=False):
        own = records[records.model == stem]
        square = own[own.method.isin(["crow", "crow~code", "crow~zero", "crow~wiped"])]
        if len(square.drop_duplicates(["perturbation", "accumulated"])) > 1:
            report.figure(lambda part=part, square=square: _two_by_two(part, square), f"two_by_two_{stem}",
                          f"{model}: what the released loss leaves out. Perturbation real or zero (SPEC 10.1), accumulation "
                          "kept or wiped (SPEC 10.2): the paper's CROW is real and kept, the released code zero and wiped. ASR "
                          "and perplexity over the attacks that have the cells; bars are 95 % intervals, lines other cells.")
        bars = part[part.metric.isin([protocol[0] for protocol in language_figures.PROTOCOLS])]
        spread = bars.assign(place=bars.dataset + bars.attack_key).groupby("method").place.nunique()
        bars = bars[bars.method.map(spread) * 2 >= spread.max()]  # sweeps on a few attacks have figures of their own
        if len(bars):
            report.figure(lambda bars=bars: language_figures.asr_bars(bars, order), f"asr_{stem}",
                          f"{model}: attack success by defence, under both prompts and denominators, with 95 % intervals.")
        wide = _trade_off(part)
        if len(wide):
            report.figure(lambda wide=wide: language_figures.trade_off(wide, order), f"trade_off_{stem}",
                          f"{model}: attack success against perplexity of held-out answers; good defences stand bottom left.")
        curves = _curves(own)
        if len(curves):
            shown = ["base model", "no defence", *[label for label in order if label in set(curves.label) - {"no defence"}]]
            report.figure(lambda curves=curves, shown=shown: language_figures.layer_curves(curves, shown), f"layers_{stem}",
                          f"{model}: Figure 1 of the paper, before and after. Mean cosine of consecutive layers on clean minus "
                          "on triggered prompts, 95 % bootstrap interval over prompts; below zero, triggered prompts are more "
                          "consistent than clean ones.")
        for column in ("alpha", "epsilon"):
            table = sweep_table(part, own, column)
            if len(table):
                report.figure(lambda table=table, column=column: language_figures.sweep(table, column), f"{column}_{stem}",
                              f"{model}: CROW over {column} (Tables 5 and 6), with 95 % intervals.")
        first = own[own.stage == "victim"].head(1)
        if len(first):
            same = own[(own.seed == first.iloc[0].seed) & (own.stage == "victim")
                       | ((own.attack_key == first.iloc[0].attack_key) & (own.dataset == first.iloc[0].dataset)
                          & (own.seed == first.iloc[0].seed) & own.method.isin(["crow", "crow~code", "finetune"]))]
            histories = {f"{row.dataset}, {row.attack_label}: {row.label}": history_of(row.path) for row in same.itertuples()}
            histories = {name: history for name, history in histories.items() if len(history)}
            if histories:
                report.figure(lambda histories=histories: language_figures.losses(histories), f"losses_{stem}",
                              f"{model}: losses of the victims and of the tuning defences on the first of them (Figure 3).")


def _two_by_two(pool: pd.DataFrame, square: pd.DataFrame):
    """The headline figure, pooled over the attacks that have every cell of the square that is there at all."""
    switches = square.drop_duplicates("method").set_index("method")[["perturbation", "accumulated"]]
    keys = ["dataset", "recipe", "attack_key"]
    has = square.groupby(keys).method.nunique()
    kept = has[has == has.groupby("dataset").transform("max")].reset_index()[keys]
    chosen = pool.merge(kept, on=keys)
    chosen = chosen[chosen.metric.isin(["asr_template_all", "perplexity"])]
    over = (chosen.assign(weighted=chosen.value * chosen.n.clip(lower=1), weight=chosen.n.clip(lower=1))
            .groupby(["dataset", "metric", "method", "label"], sort=False)
            .agg(weighted=("weighted", "sum"), weight=("weight", "sum"), n=("n", "sum"), low=("low", "mean"),
                 high=("high", "mean")).reset_index())
    over["value"] = over.weighted / over.weight
    rates = over.n > 0
    bounds = [wilson(round(row.value * row.n), row.n) for row in over[rates].itertuples()]
    over.loc[rates, ["low", "high"]] = bounds
    table = over[over.method.isin(switches.index)].join(switches, on="method")
    references = over[over.method.isin(["victim", "finetune", "finetune~lr1e3"])]
    return language_figures.two_by_two(table, references)


def _trade_off(pool: pd.DataFrame) -> pd.DataFrame:
    """One row per setting and method that has both ASR and perplexity."""
    keys = ["dataset", "recipe", "attack_key", "attack_label", "method", "label"]
    sides = [pool[(pool.metric == metric) & pool.value.notna()][[*keys, "value", "low", "high"]].rename(
        columns={"value": name, "low": f"{name}_low", "high": f"{name}_high"})
        for metric, name in (("asr_template_all", "asr"), ("perplexity", "perplexity"))]
    return sides[0].merge(sides[1], on=keys)


def _curves(records: pd.DataFrame) -> pd.DataFrame:
    """Figure 1 of the first seed: base model, victim, and the defences that tell most."""
    shown = records[records.method.isin(["victim", "crow", "crow~code", "finetune", "finetune~lr1e3", "magnitude"])]
    shown = shown[shown.seed == shown.seed.min()] if len(shown) else shown
    found = []
    for row in shown.itertuples():
        file = Path(row.path) / "layers.csv"
        if not file.is_file() or file.stat().st_size <= 1:
            continue
        curve = pd.read_csv(file)
        curve["number"] = curve.pair.str.partition("-")[0].astype(int)
        curve["label"] = np.where(curve.model == "base", "base model", row.label)
        found.append(curve.assign(panel=f"{row.dataset}: {row.attack_label}"))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()
