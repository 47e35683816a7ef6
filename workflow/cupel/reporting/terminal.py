"""What a run says on a terminal: a job in words while it runs, the findings of the papers when all is done.

Imported by every run for its first half, so nothing heavy is imported before the findings are asked for.
"""

import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

#: rules whose names are no words for people
KINDS = {
    "prepare_images": "data", "prepare_text": "data", "prepare_vision_language": "data", "prepare_language_model": "model",
    "prepare_trigger": "trigger", "train_victim": "victim", "purify": "defence", "train_robust": "training",
    "attack_network": "attack", "train_text_victim": "victim", "purify_text": "defence", "compose_texts": "texts",
    "build_model": "base model", "poison_samples": "poison", "trigger_samples": "triggers",
    "train_vision_language_victim": "victim", "read_attention": "attention", "measure_filters": "filters", "refit": "defence",
    "purify_pictures": "defence", "gather_cells": "table of cells", "report_paper": "tables, figures",
    "judge_claims": "verdicts", "paper_page": "page", "index": "first page", "feature_maps": "features",
    "contact_sheet": "triggers drawn", "cross": "cross table", "compare": "two runs compared", "look_at_own": "first look",
    "purify_own": "defence", "report_own": "page", "gather_own": "first page",
}
#: names as papers write them; others stand as they are in paths
NAMES = {
    "badnets": "BadNets", "blended": "Blended", "sig": "SIG", "lf": "LF", "bpp": "BPP", "wanet": "WaNet",
    "input_aware": "Input-aware", "blended_bypass": "Bypass", "resnet18": "ResNet-18", "preactresnet18": "PreActResNet-18",
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "gtsrb": "GTSRB", "tiny_imagenet": "Tiny-ImageNet", "mnist": "MNIST",
}


def job_words(rule: str, wildcards: Mapping[str, str], cells: int = 1, defences: Mapping[str, str] | None = None) -> str:
    """A job in a few words, as `victim  BadNets 5 %, ResNet-18, CIFAR-10`.

    Args:
        rule: its name; that of the rule with wildcards for one that is made for a single case.
        wildcards: name to value.
        cells: how many it makes.
        defences: names of defences for people.
    """
    def name(key: str) -> str:
        value = wildcards.get(key, "")
        base, _, variant = value.partition("~")
        return (defences or {}).get(value) if key == "defence" and value in (defences or {}) else (
            NAMES.get(base, base) + (f" ({variant.replace('_', ' ')})" if variant else ""))

    rate = wildcards.get("rate")
    attack = f"{name('attack')} {100 * float(rate):g} %" if rate and float(rate) else name("attack")
    seed = wildcards.get("seed", "0")
    words = [name("paper"), name("sheet"), name("defence"), attack, name("evaluation"), name("model"), name("dataset"),
             f"seed {seed}" if seed != "0" else ""]
    kind = KINDS.get(rule, rule.replace("_", " "))
    return f"{f'{cells} {kind}s' if cells > 1 else kind}  {', '.join(filter(None, words))}".rstrip()


def duration(seconds: float) -> str:
    """A time for people, to a digit or two."""
    return (f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s" if seconds < 100
            else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h")


def counted(count: int, what: str) -> str:
    """As `2 jobs`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def shortened(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[:max(width - 1, 0)].rstrip() + "…"


def reason(log: str) -> str:
    """Why a job failed: the error that ends its log, without the frames that led there; the last line where it has none."""
    found = re.split(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*", log, flags=re.MULTILINE)
    lines = [line for line in (found[-1] if len(found) > 1 else log[-300:]).splitlines() if line.strip()]
    return "\n".join(lines if len(found) > 1 else lines[-1:])


def findings(key: str, title: str, claims, width: int) -> list[str]:
    """At most five lines on a paper: how many claims came out how, and the first four of those with a verdict.

    Args:
        key, title: of the paper.
        claims: DataFrame, its rows of `claims.csv`.
        width: of a line, characters.
    """
    claims = claims.astype(dict.fromkeys(("effect", "low", "high"), float))
    verdict = claims.verdict.where(claims.verdict != "indicated", claims.verdict + " " + claims.direction)
    judged = claims.assign(said=verdict, open=claims.verdict == "open")[claims.effect.notna()]
    counts = ", ".join(f"{count} {name}" for name, count in verdict.value_counts(sort=False).items())
    lines = [f"{key}: {title}. {counted(len(claims), 'claim')}: {counts}" if len(claims) else f"{key}: {title}. No claims"]
    for row in judged.sort_values("open", kind="stable").head(4).itertuples():
        factor, form, unit = (100, "{:+.1f}", " points") if "fraction" in row.unit else (1, "{:+.3g}", "")
        effect, low, high = (form.format(factor * value) for value in (row.effect, row.low, row.high))
        interval = "no interval" if math.isnan(row.low) else f"{low} … {high}"
        basis = f"{counted(row.settings, 'setting')} x {counted(row.seeds, 'seed')}"
        lines.append(f"{row.said} {effect}{unit} ({interval}), {basis}: {row.statement}")
    return [shortened(lines[0], width), *("  " + shortened(line, width - 2) for line in lines[1:])]


def summary(papers: Iterable[tuple[str, str, str | Path]], cells: str | Path | None = None,
            expected: Iterable[Mapping] = ()) -> str:
    """What a run found.

    Args:
        papers: key, title and claims.csv of each.
        cells: tidy table, for what failed; None: it was not made.
        expected: cells, with paper and folder, that the table must hold, and no other.
    """
    import pandas as pd

    from cupel.evaluation.settings import NO_VICTIM, NOT_RUN
    from cupel.reporting.tables import misfit

    width = min(max(shutil.get_terminal_size((160, 24)).columns, 80), 160)
    lines = []
    for key, title, file in papers:
        lines += findings(key, title, pd.read_csv(file, dtype={"direction": str}), width)
    if cells:
        table = pd.read_parquet(cells)
        failed = table.query("status == 'failed'").drop_duplicates("path")
        if len(failed):
            lines.append(f"{counted(len(failed), 'cell')} failed, shown in the report:")
            lines += ["  " + shortened(f"{row.path}: {row.reason}", width - 2) for row in failed.head(5).itertuples()]
        if waiting := table[table.status == NOT_RUN].path.nunique():
            lines.append(f"{counted(waiting, 'cell')} of the report {'was' if waiting == 1 else 'were'} not run")
        weak = table[table.stage.isin(["victim"]) & (table.status == "ok") & ~table.valid].drop_duplicates("path")
        if len(weak):
            lines.append(f"{counted(len(weak), 'victim')} beyond the gate: {NO_VICTIM}, so no merit of a defence:")
            lines += ["  " + shortened(str(path), width - 2) for path in weak.path.head(5)]
        lines += filter(None, [misfit(table, expected)])
    return "\n".join(lines)
