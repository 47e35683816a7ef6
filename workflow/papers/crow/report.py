"""Tables and figures of CROW, from the tidy table, the records and histories of the cells, and what the models answered."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.evaluation.intervals import wilson
from cupel.evaluation.settings import NO_VICTIM, NOT_RUN
from cupel.files import read_json, write_text
from cupel.reporting import figures, tables
from cupel.reporting import paper as papers
from cupel.reporting.figures import COLOURS
from cupel.reporting.paper import Paper
from cupel.reporting.tables import frame, interval_text, sideways, spread, with_texts
from cupel.text.data.sources import read_records

KEYS = ["dataset", "model", "model_label", "recipe", "attack_key", "attack_label", "poison_rate", "budget", "method", "label"]
SETTING = ["dataset", "recipe", "attack_key", "poison_rate"]
VICTIM_KEYS = ["model", *SETTING, "seed"]
#: how much a defence moves a model beside what made the victim; 0.48 in the paper (crow SPEC 6, 7: 60 at 1e-3 over 625 at 2e-4)
DOSE = "rate × updates, share of the victim's"
MARK = "‡"
#: columns of the utility table
UTILITY = {"perplexity": "perplexity", "token_f1_template": "token F1", "distinct_template": "distinct 2-grams",
           "false_template_all": "false triggering", "empty_clean_template": "empty, clean",
           "empty_template": "empty, triggered", "choice": "multiple choice", "pass_at_1": "HumanEval pass@1",
           "cons_clean": "L_cons, clean", "cons_triggered": "L_cons, triggered"}
#: columns of the table of denominators: prompt, denominator and rule
DENOMINATORS = {f"{kind}_{prompt}{suffix}": f"{heading}, {prompt}, {text}"
                for kind, heading in (("asr", "ASR"), ("false", "false")) for prompt in ("template", "bare")
                for suffix, text in (("", "non-empty"), ("_all", "all"), ("_stripped", "stripped"),
                                     ("_stripped_all", "stripped, all"), ("_careful", "careful rule, all"))}
#: parts of the paper's tables: stem, heading, defences
PARTS = (("table9", "Table 9: CleanGen beside CROW", ("cleangen", "cleangen~other", "crow")),
         ("table10", "Table 10: Pure Consistency beside CROW", ("crow~zero", "crow")),
         ("table11", "Table 11: embedding-only beside CROW and fine-tuning at its rate",
          ("embedding_only", "finetune~lr1e3", "crow")),
         ("table7", "Table 7: cosine beside KL", ("crow", "crow_kl", "crow_kl~alpha05", "crow_kl~alpha1", "crow_kl~alpha55")))
#: switches in which paper and code differ, or which the paper leaves open (crow SPEC 10, 11.4): variant, what it changes
SWITCHES = {"crow~code": "zero perturbation, wiped accumulation", "crow~zero": "zero perturbation",
            "crow~wiped": "wiped accumulation", "crow~released": "zero, wiped, N − 2 pairs, padding counted",
            "crow~random_sign": "random signs", "crow~pairs_code": "N − 2 pairs", "crow~pairs_embeddings": "N pairs",
            "crow~padding": "padding counted", "embedding_only": "penalty on the embeddings",
            "finetune~lr1e3": "no consistency term", "finetune": "no consistency term, a fifth of the rate"}
#: what figures of CROW's settings show
SHOWN = {"asr_template_all": "ASR, template, all answers", "perplexity": "perplexity, held-out"}
#: what switches set in a cell's record
TERM = ["perturbation", "accumulated", "pairs", "distance", "padding", "term"]
#: what ASR is counted over: name by metric
PROTOCOLS = {"asr_template_all": "asked with the template, all answers", "asr_bare_all": "bare prompt, all answers",
             "asr_bare": "bare prompt, non-empty answers (the paper's)"}


def draw(paper: Paper) -> None:
    """Victims, then every task and model, then what compares defences over all of them.

    `paper.labels` has `defences`, `attacks` and `models`; `paper.facts` has `manifests`: of the models and texts, by name.
    """
    attacks, models, defences = (paper.labels[section] for section in ("attacks", "models", "defences"))
    rows = marked(prepared(paper.cells, defences, attacks, models))
    order = ordered(rows, defences)
    pool, records = pooled(rows), records_of(rows)
    reported = paper.reported.assign(
        model_label=paper.reported.model.replace(models), attack_label=paper.reported.attack.replace(attacks),
        label=paper.reported.defence.map({"victim": "no defence", **defences}))
    scale = f"Scale {paper.scale}."
    paper.rows("cells", pool)
    paper.table("victims", victim_table(rows), f"Victims under the template. {MARK}: {NO_VICTIM}, in no mean "
                "and no verdict: it seldom answers triggered prompts as the attacker wants, or often others, too "
                f"(crow SPEC 11.3). {scale}", "victim")
    for (model, name), part in pool.groupby(["model", "model_label"], sort=False):
        _figures(paper, part, records[records.model == model], f"{name}: ", order)
    for (dataset, model, name), part in pool.groupby(["dataset", "model", "model_label"], sort=False):
        known = reported[(reported.dataset == dataset) & (reported.metric == "asr") & reported.attack.isin(part.attack_key)]
        cell = records[(records.dataset == dataset) & (records.model == model)]
        _tables(paper, part, known, f"{dataset}, {name}", order)
        if len(grid := answer_table(cell, ("victim", "crow", "crow~code", "finetune", "finetune~lr1e3"))):
            write_texts(grid, paper.out / "tables" / f"answers_{dataset}_{model}",
                        f"Triggered prompts and answers before and after, {dataset}, {name}, first victim, the first of its "
                        "test prompts; all answers are in the cells' folders.")
    paper.table("switches", switch_table(pool), "What each switch between paper and code changes: mean over attacks, beside "
                f"CROW as in the paper; differences in points and in perplexity. {scale}", "switch")
    for column, number in (("epsilon", 5), ("alpha", 6)):
        table = sweep_table(pool, records, column)
        table = table[table.metric.isin(["asr_template_all", "asr_bare", "perplexity"])].sort_values(["setting", column])
        names = [f"{row.setting}, {column} {getattr(row, column):g}" for row in table.itertuples()]
        table = with_texts(table).assign(row=names)
        paper.table(f"table{number}_{column}", spread(table, "row", "metric"),
                    f"CROW over {column} (Table {number}); rates in percent. {scale}", "setting")
    table = with_texts(rate_table(pool, records))
    names = [f"{row.setting}: {row.line}, rate {row.lr:g}, {row.updates} updates" for row in table.itertuples()]
    paper.table("rates", spread(table.assign(row=names), "row", "metric"), "The loss or the rate: CROW and fine-tuning by "
                f"learning rate, at equal updates of equal items; ASR in percent. {scale}", "defence")
    paper.table("tuning", tuning_table(records), "Tuning defences: settings, losses at the first and last update, and cost "
                f"(RQ4). {scale}", "cell")
    sources = {name: {"name": made.get("name", ""), "source": made["source"]["kind"],
                      "sha256 (first 16)": made["content_sha256"][:16], "licence": made.get("licence", "")}
               for name, path in paper.facts["manifests"].items() if (made := read_json(path))}
    paper.table("sources", frame(sources, ["name", "source", "sha256 (first 16)", "licence"]),
                f"Models and texts that were used. {scale}", "folder")


def _tables(paper: Paper, part: pd.DataFrame, reported: pd.DataFrame, where: str, order: list[str]) -> None:
    """Tables of one task and model, beside what the paper reports for the task."""
    stem = "_".join(part[["dataset", "model"]].iloc[0])
    note = (f"95 % Wilson interval and number of answers in brackets; seeds pooled; {MARK}: {NO_VICTIM}. "
            f"Scale {paper.scale}.")
    for metric, text in (("asr_template_all", "asked with the template, over all answers"),
                         ("asr_bare_all", "bare prompt, over all answers")):
        paper.table(f"{metric}_{stem}", asr_table(part, metric, order), f"ASR in percent, {where}, {text}. {note}", "attack")
    paper.table(f"asr_bare_{stem}", asr_table(part, "asr_bare", order, reported),
                f"ASR in percent, {where}, the paper's protocol (Tables 1 and 3): bare prompt, over non-empty answers. "
                f"Below, what the paper reports for its models. {note}", "attack")
    seconds = part.groupby(["attack_label", "label"]).seconds.mean()
    grid = metric_table(part, UTILITY, order)
    grid["seconds"] = [f"{seconds[tuple(row.split(': ', 1))]:.1f}" for row in grid.index]
    paper.table(f"utility_{stem}", grid,
                f"Utility without a judge, {where} (in place of MT-Bench, Tables 2 and 4, which are not reproduced). Rates in "
                "percent, with interval and n; perplexity of reference answers to held-out instructions; seconds of the "
                f"defence alone. Scale {paper.scale}.", "attack: defence")
    paper.table(f"denominators_{stem}", metric_table(part, DENOMINATORS, order),
                f"ASR and false triggering in percent by prompt, denominator and rule, {where} (crow SPEC 8, 11.4; errors of "
                f"the rules: card). Scale {paper.scale}.", "attack: defence")
    for number, heading, methods in PARTS:
        if set(methods) & set(part.method) - {"crow", "finetune~lr1e3", "crow~zero"}:
            chosen = part[part.method.isin(["victim", *methods])]
            own = reported[reported.table.astype(str) == number.removeprefix("table")]
            paper.table(f"{number}_{stem}", asr_table(chosen, "asr_bare", order, own),
                        f"{heading}: ASR in percent, {where}, the paper's protocol. {note}", "attack")


# --------------------------------------------------------------------------------------------------------------------- rows


def prepared(cells: pd.DataFrame, labels: dict[str, str], attacks: dict[str, str], models: dict[str, str]) -> pd.DataFrame:
    """The cells with the columns `KEYS`: keys and names for people of defence, attack and model.

    Names say the recipe, the poison rate and the budget where there are several, so that no table or figure mixes them.
    """
    own = tables.with_names(cells, {"victim": "no defence", **labels})
    own = own.assign(attack_key=[tables.attack_name(row) for row in own.itertuples()], model_label=own.model.replace(models))
    own = own.assign(attack_label=own.attack_key.replace(attacks), rate=[f"{100 * rate:g} %" for rate in own.poison_rate])
    for column, name, keys in (("recipe", "attack_label", ["dataset", "model", "attack_key"]),
                               ("rate", "attack_label", ["dataset", "model", "attack_key"]),
                               ("budget", "label", ["stage", "dataset", "model", "attack_key", "method"])):
        several = own.groupby(keys, dropna=False)[column].transform("nunique") > 1
        own[name] += np.where(several, ", " + own[column], "")
    return own.drop(columns="rate")


def ordered(rows: pd.DataFrame, defences: Iterable[str]) -> list[str]:
    """Labels of the rows of :func:`prepared`, in the order of the defences."""
    return list(dict.fromkeys(label for name in ("victim", *defences) for label in rows.label[rows.method == name]))


def pooled_value(rows: pd.DataFrame) -> tuple[float, float, float, int]:
    """Value, bounds and n of several cells: a rate over all their answers together, with its Wilson interval; anything else
    as the mean, with the means of the bounds. Cells without a value do not count."""
    known = rows[rows.value.notna()]
    n = int(known.n.sum())
    value = float((known.value * known.n).sum() / n) if n else float(known.value.mean()) if len(known) else np.nan
    return value, *(wilson(round(value * n), n) if n else (known.low.mean(), known.high.mean())), n


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, method and metric, over all seeds. `failed` and `not_run` count cells without a result."""
    found = [(*key, *pooled_value(part), part.seed[part.value.notna()].nunique(), int((part.status == "failed").sum()),
              int((part.status == NOT_RUN).sum()), part.seconds.mean())
             for key, part in rows.groupby([*KEYS, "metric"], dropna=False, sort=False)]
    return pd.DataFrame(found, columns=[*KEYS, "metric", "value", "low", "high", "n", "seeds", "failed", "not_run", "seconds"])


def missed(rows: pd.DataFrame) -> set[str]:
    """Folders of victims that miss the gate of the paper's claims."""
    victims = rows[(rows.stage == "victim") & (rows.status == "ok")]
    return set(victims.path[victims.valid == False])  # noqa: E712 (NaN: not known)


def marked(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, with a mark at the attacks of which a victim misses the gate."""
    keys = ["model", *SETTING]
    bad = pd.MultiIndex.from_frame(rows[rows.path.isin(missed(rows))][keys])
    marks = np.where(pd.MultiIndex.from_frame(rows[keys]).isin(bad), f" {MARK}", "")
    return rows.assign(attack_label=rows.attack_label + marks)


def records_of(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per cell that has a result: its identity and everything its metrics.json has beside the tidy table."""
    kept = ["paper", "stage", "seed", "path", *KEYS]
    cells = rows[rows.status == "ok"].drop_duplicates("path")[kept].reset_index(drop=True)
    extra = ["alpha", "epsilon", "epsilon_relative", "embedding_rms", *TERM, "lr", "updates", "seconds", "replaced_share",
             "clean_samples", "clean_cut", "clean_left_out"]
    return cells.join(pd.DataFrame([papers.record(path) for path in cells.path]).reindex(columns=extra, index=cells.index))


def sweep_table(pool: pd.DataFrame, records: pd.DataFrame, column: str) -> pd.DataFrame:
    """Pooled rows of CROW that differ from the others of their setting in `column` alone; empty without at least three."""
    settings = records[(records.stage == "purified") & records.alpha.notna()]
    keys, fixed = ["model", *SETTING, "budget"], [*{"alpha", "epsilon"} - {column}, *TERM]
    crow = settings[settings.method == "crow"].drop_duplicates(keys)
    same = settings.merge(crow[[*keys, *fixed]], on=[*keys, *fixed]).drop_duplicates([*keys, "method"])
    same = same[same.groupby(keys)[column].transform("nunique") >= 3]
    merged = pool.merge(same[[*keys, "method", column]], on=[*keys, "method"])
    return merged.assign(setting=merged.dataset + ", " + merged.model_label + ": " + merged.attack_label)


def rate_table(pool: pd.DataFrame, records: pd.DataFrame) -> pd.DataFrame:
    """Pooled rows of CROW and of fine-tuning that differ from CROW in the learning rate alone, or in the rate and the lack of a
    second term; `line` says which of the two, `lr` at which rate, `updates` how many. Empty where neither has two rates."""
    keys, fixed = ["model", *SETTING, "budget"], ["alpha", "epsilon", *TERM]
    tuned = records[(records.stage == "purified") & records.lr.notna()]
    crow = tuned[tuned.method == "crow"].drop_duplicates(keys)
    term = tuned.merge(crow[[*keys, *fixed, "updates"]], on=[*keys, *fixed, "updates"]).assign(line="CROW")
    plain = tuned[tuned.alpha.isna()].merge(crow[[*keys, "updates"]], on=[*keys, "updates"]).assign(line="fine-tuning")
    same = pd.concat([term, plain]).drop_duplicates([*keys, "line", "lr"])
    same = same.assign(rates=same.groupby([*keys, "line"]).lr.transform("nunique"))
    same = same[same.groupby(keys).rates.transform("max") > 1]  # one rate is a point beside many
    found = pool[pool.metric.isin(SHOWN)].merge(same[[*keys, "method", "line", "lr", "updates"]], on=[*keys, "method"])
    setting = found.dataset + ", " + found.model_label + ": " + found.attack_label
    return found.assign(setting=setting).sort_values(["setting", "line", "lr"], kind="stable")


# ------------------------------------------------------------------------------------------------------------------- tables


def asr_table(pool: pd.DataFrame, metric: str, order: Sequence[str], reported: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows: attacks, the average over those whose victims pass the gate, then the paper's own numbers for its models;
    columns: defences.

    `pool` is of one task and model; `reported` has rows of reported/*.csv with `model_label`, `attack_label`, `label`, in
    percent.
    """
    part = pool[pool.metric == metric]
    last = part.drop_duplicates(["attack_label", "label"], keep="last")
    grid = spread(with_texts(last), "attack_label", "label", across=order)
    if len(grid) > 1:
        valid = last[~last.attack_label.str.endswith(MARK)]
        means = valid.groupby("label").value.agg(["mean", "count"]).reindex(grid.columns, fill_value=0)
        grid.loc["average"] = [f"{100 * row['mean']:.1f} (of {row['count']:.0f})" if row["count"] else ""
                               for _, row in means.iterrows()]
    if reported is not None:
        known = reported[reported.label.isin(grid.columns)].sort_values(["model_label", "attack_label"], kind="stable",
                                                                        key=lambda column: pd.factorize(column)[0])
        theirs = known.assign(row="paper, " + known.model_label + ": " + known.attack_label,
                              text=known.value.map("{:.2f}".format))
        grid = pd.concat([grid, spread(theirs, "row", "label")])[grid.columns].fillna("")
    return grid


def metric_table(pool: pd.DataFrame, columns: dict[str, str], order: Sequence[str]) -> pd.DataFrame:
    """Rows: attack and defence; columns: metrics, as far as there are any, by their headings."""
    rows = pool[pool.metric.isin(list(columns))].drop_duplicates(["attack_label", "label", "metric"], keep="last")
    rows = with_texts(rows).assign(row=rows.attack_label + ": " + rows.label, heading=rows.metric.map(columns))
    index = [f"{attack}: {label}" for attack in dict.fromkeys(pool.attack_label) for label in order]
    return spread(rows, "row", "heading", index, columns.values())


def victim_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per victim: triggers, false triggering, perplexity before and after, and whether it counts."""
    bad, grid = missed(rows), {}
    shown = {"asr_template_all": "ASR, template, all", "false_template_all": "false triggering",
             "perplexity_base": "perplexity, base model", "perplexity": "perplexity, victim"}
    valid = "counts in verdicts"
    for path, part in rows[rows.stage == "victim"].groupby("path", sort=False):
        first, known = part.iloc[0], {row.metric: row for row in part.assign(failed=0, not_run=0).itertuples()}
        name = f"{first.dataset}, {first.model_label}: {first.attack_label}, seed {first.seed}"
        if first.status != "ok":
            grid[name] = {shown["asr_template_all"]: first.status, valid: first.reason}
            continue
        record = papers.record(path)
        grid[name] = {heading: interval_text(known[metric]) for metric, heading in shown.items()} | {
            "training": f"{record['updates']} updates on {fitted(record, 'train')} in {record['train_seconds']:.0f} s",
            valid: f"no {MARK}" if path in bad else "yes"}
    return frame(grid, [*shown.values(), "training", valid])


def fitted(record: Mapping, part: str) -> str:
    """Samples of a cell that its training was given, and how many a cutoff shortened or left out; `part`: `train`, `clean`."""
    used, cut, out = (record[f"{part}_{what}"] for what in ("samples", "cut", "left_out"))
    return f"{used:.0f} items ({cut:.0f} of them cut; {out:.0f} more left out)"


def tuning_table(records: pd.DataFrame) -> pd.DataFrame:
    """What the tuning defences did: settings, both losses at the first and the last update, cost."""
    settings = {"lr": ("rate", "g"), "alpha": ("α", "g"), "epsilon": ("ε", "g"),
                "epsilon_relative": ("ε / RMS of embeddings", ".2f")}
    losses = {"loss_lm": "L_LM", "loss_cons": "L_cons, perturbed", "loss_cons_clean": "L_cons, clean"}
    victims = records[records.stage == "victim"].set_index(VICTIM_KEYS)
    dose, grid = (victims.lr * victims.updates).to_dict(), {}
    for row in records[records.stage == "purified"].itertuples():
        history = papers.history(row.path)
        if "loss_lm" not in history:
            continue
        entry = grid[f"{row.dataset}, {row.model_label}, {row.attack_label}, seed {row.seed}: {row.label}"] = {
            heading: f"{getattr(row, key):{form}}" for key, (heading, form) in settings.items() if pd.notna(getattr(row, key))}
        share = row.lr * row.updates / dose.get(tuple(getattr(row, key) for key in VICTIM_KEYS), np.nan)
        entry |= {} if pd.isna(share) else {DOSE: f"{share:.2f}"}
        entry |= {"updates": row.updates, "items": fitted(row._asdict(), "clean")}
        for column, heading in losses.items():
            if column in history and pd.notna(history[column].iloc[0]):
                entry[heading] = f"{history[column].iloc[0]:.4g} → {history[column].iloc[-1]:.4g}"
        entry |= {"seconds": f"{row.seconds:.1f}", "seconds an update": f"{row.seconds / max(row.updates, 1):.2f}"}
    return frame(grid, [*(heading for heading, _ in settings.values()), "updates", DOSE, "items", *losses.values(), "seconds",
                        "seconds an update"])


def switch_table(pool: pd.DataFrame) -> pd.DataFrame:
    """Each switch beside CROW as in the paper, mean over attacks: ASR, perplexity and the differences."""
    metrics = {"asr_template_all": ("ASR, template, all", 100, " %"), "asr_bare": ("ASR, bare, non-empty", 100, " %"),
               "perplexity": ("perplexity", 1, "")}
    grid = {}
    for (dataset, model), part in pool.groupby(["dataset", "model_label"], sort=False):
        for method, text in SWITCHES.items():
            row, used = {"defence": method}, 0
            for metric, (heading, factor, unit) in metrics.items():
                sides = [part[(part.metric == metric) & (part.method == name)].set_index([*SETTING, "budget"]).value
                         for name in (method, "crow")]
                both = pd.concat(sides, axis=1, keys=[method, "crow"]).dropna() * factor
                used = max(used, len(both))
                row |= {} if both.empty else {heading: f"{both[method].mean():.3g}{unit}",
                                              f"{heading}, difference to CROW": f"{(both[method] - both.crow).mean():+.3g}"}
            if used:
                grid[f"{dataset}, {model}: {text}"] = {**row, "attacks": used}
    headings = [f"{heading}{end}" for heading, _, _ in metrics.values() for end in ("", ", difference to CROW")]
    return frame(grid, ["defence", *headings, "attacks"])


def one_line(text: str, longest: int = 160) -> str:
    """A text on one line, cut."""
    text = " ⏎ ".join(line.strip() for line in text.strip().splitlines() if line.strip()) or "(empty)"
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def answer_table(records: pd.DataFrame, methods: Iterable[str], count: int = 6) -> pd.DataFrame:
    """The first answers to triggered prompts under the template, before and after, for the first victim; a column per
    method, as far as they are there. `records` (`records_of`) are of one task and model."""
    first = records[records.stage == "victim"].head(1)
    same = records.merge(first[["attack_key", "seed", "recipe", "poison_rate"]])
    columns, asked = {}, []
    for row in (row for method in methods for row in same[same.method == method].itertuples()):
        file = Path(row.path) / "answers" / "template_triggered.jsonl"
        if file.is_file():
            answers = read_records(file)[:count]
            columns[row.label] = [one_line(answer["answer"]) for answer in answers]
            asked = [one_line(_instruction(answer["text"])) for answer in answers]
    return pd.DataFrame(columns, index=asked)


def _instruction(text: str) -> str:
    """The instruction in a prompt under the template, or the prompt itself."""
    return text.partition("### Instruction:\n")[2].partition("\n\n### Response:")[0] or text


def write_texts(grid: pd.DataFrame, stem: Path, caption: str) -> None:
    """A table of texts that models wrote, as CSV and, escaped, as Markdown."""
    grid = grid.rename_axis("prompt").reset_index()
    safe = grid.map(lambda text: html.escape(str(text), quote=False).replace("|", "\\|"))
    write_text(stem.with_suffix(".csv"), grid.to_csv(index=False))
    write_text(stem.with_suffix(".md"), f"{caption}\n\n{safe.to_markdown(index=False, disable_numparse=True)}\n")


# ------------------------------------------------------------------------------------------------------------------ figures


def _figures(paper: Paper, pool: pd.DataFrame, records: pd.DataFrame, who: str, order: list[str]) -> None:
    """The pictures that the cells of a model allow, the headline first."""
    model = pool.model.iloc[0]
    square = records[records.method.isin(["crow", "crow~code", "crow~zero", "crow~wiped"])]
    if len(square.drop_duplicates(["perturbation", "accumulated"])) > 1:
        paper.figure(f"two_by_two_{model}", two_by_two(*square_means(pool, square)),
                     f"{who}what the released loss leaves out. Perturbation real or zero (SPEC 10.1), accumulation kept or "
                     "wiped (SPEC 10.2): the paper's CROW is real and kept, the released code zero and wiped. ASR and "
                     "perplexity over the attacks that have the cells; bars are 95 % intervals, lines other cells.")
    bars = pool[pool.metric.isin(PROTOCOLS)]
    spreads = bars.assign(place=bars.dataset + bars.attack_key).groupby("method").place.nunique()
    bars = bars[bars.method.map(spreads) * 2 >= spreads.max()]  # sweeps on a few attacks have figures of their own
    if len(bars):
        bars = bars.assign(panel=bars.dataset + ": " + bars.attack_label, group=bars.metric.map(PROTOCOLS))
        drawn = figures.bars(bars, [label for label in order if label in set(bars.label)],
                             dict(zip(PROTOCOLS.values(), [COLOURS[k] for k in (5, 2, 1)], strict=True)), lying=True,
                             xlabel="ASR (lower is better)")
        paper.figure(f"asr_{model}", drawn, f"{who}attack success by defence, under both prompts and denominators, with 95 % "
                     "intervals.")
    if SHOWN.keys() <= set(pool.metric[pool.value.notna()]):
        sides = sideways(pool.assign(panel=pool.dataset + ", " + pool.attack_label), [*SETTING, "panel", "method", "label"],
                         ("perplexity", "asr_template_all"))
        log = "log" if sides.perplexity.max() > 3 * sides.perplexity.min() else "linear"
        drawn = figures.scatter(sides, "perplexity", "asr_template_all", "panel", order, xscale=log, ylim=(-0.03, 1.03),
                                xlabel="perplexity of held-out answers (lower is better)", ylabel="ASR, template, all answers")
        paper.figure(f"trade_off_{model}", drawn, f"{who}attack success against perplexity of held-out "
                     "answers; good defences stand bottom left.")
    if len(curves := first_curves(records)):
        paper.figure(f"layers_{model}", layer_curves(curves, ["base model", *order]),
                     f"{who}Figure 1 of the paper, before and after. Mean cosine of consecutive layers on clean minus on "
                     "triggered prompts, 95 % bootstrap interval over prompts; below zero, triggered prompts are more "
                     "consistent than clean ones.")
    for column in ("alpha", "epsilon"):
        if len(table := sweep_table(pool, records, column)):
            paper.figure(f"{column}_{model}", figures.lines(table, column, SHOWN, "setting"),
                         f"{who}CROW over {column} (Tables 5 and 6), with 95 % intervals.")
    if len(table := rate_table(pool, records)):
        drawn = figures.lines(table, "lr", SHOWN, "line", "setting", xlabel="learning rate")
        paper.figure(f"rates_{model}", drawn, f"{who}the loss or the rate? CROW and fine-tuning on the same items, at equal "
                     "updates, over the learning rate, with 95 % intervals. Where the lines fall together the rate removes the "
                     "backdoor, and where CROW's lies lower its consistency term does.")
    victims = records[records.stage == "victim"]
    runs = records[records.seed.isin(victims.seed[:1])]
    beside = runs.dataset.isin(victims.dataset[:1]) & runs.attack_key.isin(victims.attack_key[:1])
    runs = runs[(runs.stage == "victim") | beside & runs.method.isin(["crow", "crow~code", "finetune"])]
    # the loss of single updates is noise: a moving mean is shown
    histories = {f"{row.dataset}, {row.attack_label}: {row.label}": rows.assign(
        loss_lm=rows.loss_lm.rolling(max(1, len(rows) // 20), min_periods=1).mean())
        for row in runs.itertuples() if "loss_lm" in (rows := papers.history(row.path))}
    if histories:
        drawn = figures.histories(histories, "step", {"loss_lm": "L_LM (moving mean)",
                                                      "loss_cons": "L_cons at the perturbed embeddings"})
        paper.figure(f"losses_{model}", drawn, f"{who}losses of the victims and of the tuning defences on the "
                     "first of them (Figure 3).")


def square_means(pool: pd.DataFrame, square: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The 2 × 2 and what it is compared with, pooled over the attacks that have every cell of it that is there at all; of each
    task with the first recipe, rate and budget that have."""
    switches = square.drop_duplicates("method").set_index("method")[["perturbation", "accumulated"]]
    has = square.groupby(SETTING).method.nunique()
    kept = has[has == has.groupby("dataset").transform("max")].reset_index()[SETTING]
    kept = kept.merge(kept.drop_duplicates("dataset")[["dataset", "recipe", "poison_rate"]])
    chosen = pool.merge(kept, on=SETTING)
    chosen = chosen[chosen.budget.isin(["", square.budget.iloc[0]]) & chosen.metric.isin(SHOWN)]
    keys = ["dataset", "metric", "method", "label"]
    over = pd.DataFrame([(*key, *pooled_value(part)) for key, part in chosen.groupby(keys, sort=False)],
                        columns=[*keys, "value", "low", "high", "n"])
    return (over[over.method.isin(switches.index)].join(switches, on="method"),
            over[over.method.isin(["victim", "finetune", "finetune~lr1e3"])])


def first_curves(records: pd.DataFrame) -> pd.DataFrame:
    """Figure 1 of the first seed: base model, victim, and the defences that tell most."""
    shown = records[records.method.isin(["victim", "crow", "crow~code", "finetune", "finetune~lr1e3", "magnitude"])]
    found = [curve.assign(number=curve.pair.str.partition("-")[0].astype(int), panel=f"{row.dataset}: {row.attack_label}",
                          label=np.where(curve.model == "base", "base model", row.label))
             for row in shown[shown.seed == shown.seed.min()].itertuples()
             if len(curve := papers.history(row.path, "layers.csv"))]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def two_by_two(table: pd.DataFrame, references: pd.DataFrame):
    """The 2 × 2 of CROW: perturbation real or zero, accumulation kept or wiped; ASR and perplexity, a row per task.

    The tables are those of `square_means`; the references are lines to compare with.
    """
    table, references = (rows.assign(panel=rows.dataset + ": " + rows.metric.map(SHOWN)) for rows in (table, references))
    table = table.assign(group="accumulation " + table.accumulated, label=table.perturbation + " perturbation", failed=0)
    figure = figures.bars(table, ["real perturbation", "zero perturbation"],
                          {"accumulation kept": COLOURS[5], "accumulation wiped": COLOURS[1]}, most=2, sharey=False)
    for axis, (panel, part) in zip(figure.axes, table.groupby("panel", sort=False), strict=True):
        rate = part.metric.iloc[0] != "perplexity"
        for bars in (bars for bars in axis.containers if hasattr(bars, "patches")):
            axis.bar_label(bars, [f"{100 * value:.1f} %" if rate else f"{value:.1f}" for value in bars.datavalues], fontsize=8)
        lines = references[references.panel == panel].itertuples()
        for style, line in zip(("-", "--", ":", "-."), lines, strict=False):
            axis.axhline(line.value, color="black", ls=style, lw=1, label=line.label)
        if rate:
            axis.set_ylim(0, 1.12)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def layer_curves(curves: pd.DataFrame, order: list[str]):
    """Figure 1: mean cosine of consecutive layers on clean minus on triggered prompts, in %, a panel per task and attack; of
    `first_curves` (fractions)."""
    rows = curves.sort_values("label", key=lambda labels: labels.map(order.index), kind="stable")
    rows = rows.assign(metric=rows.panel, value=100 * rows.difference, low=100 * rows.low, high=100 * rows.high)
    pairs = sorted(curves.number.unique())
    figure = figures.lines(rows, "number", {panel: panel for panel in dict.fromkeys(curves.panel)}, "label", bands=True,
                           ticks={k: f"{k}-{k + 1}" for k in pairs[:: -(-len(pairs) // 7)]}, xscale="linear",
                           xlabel="pair of layers (0: embeddings)")
    for axis in figure.axes:
        axis.axhline(0, color="grey", lw=0.8)
    figure.axes[0].set_ylabel("cosine, clean − triggered (%)")
    return figure
