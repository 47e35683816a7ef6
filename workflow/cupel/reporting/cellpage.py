"""The page of all cells: a table, and a panel for each with its settings, numbers, training and files."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.evaluation.settings import NO_VICTIM, validity
from cupel.experiment import overlaid
from cupel.files import read_json
from cupel.reporting.index import command
from cupel.reporting.page import link_to, navigation, write_page
from cupel.reporting.paper import history
from cupel.reporting.tables import attack_name

#: rows and columns of a history that a panel draws
ROWS, COLUMNS = 60, 6
#: columns of a history that count, and are no curves
COUNTS = ("epoch", "step", "update", "round", "stage", "seconds", "lr")
FACTS = {"seconds": "seconds", "peak_memory_mb": "peak memory, MB", "peak_vram_mb": "peak GPU memory, MB",
         "clean_samples": "clean samples of the defender", "rate_reached": "poison rate reached", "device": "device",
         "precision": "precision", "threads": "threads"}
#: what a state means
STATES = {"destroyed": "less than two thirds of the victim's ACC, CP or mean probability of a token are left",
          "unchanged": "the victim to the bit, which is what the defence made of it",
          NO_VICTIM: "ASR below 80 % or ACC below 20 %, or beyond the paper's own gate: in no mean, and no defence's merit"}


def known(value):
    """A value for JSON: numbers of four digits, None for none."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return None if value is None or value is pd.NA else value


def curves(folder: str) -> dict | None:
    """What a cell's history.csv has to draw: the column that counts, and up to `COLUMNS` curves of up to `ROWS` rows."""
    table = history(folder).select_dtypes("number")
    x = next((name for name in ("epoch", "step", "update", "round") if name in table), None)
    names = [name for name in table if name not in COUNTS and table[name].notna().sum() > 1][:COLUMNS]
    if x is None or not names:
        return None
    table = table.iloc[:: -(-len(table) // ROWS)]
    at, *drawn = ([known(value) for value in table[name].astype(float)] for name in (x, *names))
    return {"x": x, "at": at, "curves": dict(zip(names, drawn, strict=True))}


def by_class(counts: Mapping[str, Sequence], wanted: Sequence[int]) -> list[dict]:
    """What a network makes of the images of each class: how many `clean` ones there are, `right` ones among them, and `taken`:
    the other class that takes most, and how many; how many `triggered` ones, of which `hit` go where the attacker wants, and
    `kept` to their true class.

    Args:
        counts: matrices [K, K], rows true and columns predicted classes, `clean`, and `triggered` where there is an attack.
        wanted: class that the attacker wants for each, [K].
    """
    none = np.zeros((len(wanted), len(wanted)), int)
    clean, triggered = (np.array(counts.get(name, none)) for name in ("clean", "triggered"))
    wrong = clean - np.diag(np.diag(clean))
    worst = wrong.argmax(1)
    return [{"clean": int(clean[k].sum()), "right": int(clean[k, k]), "taken": [int(worst[k]), int(wrong[k, worst[k]])],
             "triggered": int(triggered[k].sum()), "hit": int(triggered[k, wanted[k]]), "kept": int(triggered[k, k])}
            for k in range(len(wanted))]


def confusion(folder: Path, used: Mapping[str, dict], data: Path) -> dict | None:
    """`by_class` of a cell whose record counts what was taken for what, with names of the classes; None for others.

    Args:
        folder: of the cell.
        used: its settings, see `settings_of`.
        data: folder of the prepared data set, whose manifest names the classes.
    """
    file = folder / "metrics.json"
    record = read_json(file) if file.is_file() else {}
    if not record.get("confusion"):
        return None
    count, settings = len(record["confusion"]["clean"]), {key.split()[0]: entry["settings"] for key, entry in used.items()}
    target = settings.get("recipe", {}).get("target", 0)
    everywhere = settings.get("attack", {}).get("policy") == "all2all"
    names = read_json(data / "manifest.json")["classes"] if (data / "manifest.json").is_file() else [*map(str, range(count))]
    return {"names": names, "target": "the next class" if everywhere else names[target],
            "rows": by_class(record["confusion"], [(k + 1) % count if everywhere else target for k in range(count)])}


def settings_of(cell: Mapping, sections: Mapping[str, str], entries: Mapping[str, Mapping], scale: str) -> dict[str, dict]:
    """What experiment.yaml says of every name of a cell: settings at this scale, and their source.

    Args:
        cell: its names.
        sections: of the family, and by which key of a block their entries are named.
        entries: of the family, by section and name.
    """
    found = {}
    for section, key in sections.items():
        entry = entries.get(section, {}).get(name := cell.get(key.removesuffix("s"), ""))
        if entry:
            settings = overlaid(entry, dataset=cell.get("dataset"), model=cell.get("model"), scale=scale)
            found[f"{section.removesuffix('s')} {name}"] = {"source": entry.get("source", "not given"), "settings": settings}
    return found


def write_cells(cells: pd.DataFrame, expected: Iterable[Mapping], run: Mapping, page: str | Path) -> None:
    """Write the page.

    Args:
        cells: the tidy table.
        expected: every cell with `paper`, `family`, `folder` and its names (`cupel.experiment.Grid.cells`).
        run: `config`, `papers` (key and folder), `families` (sections and entries by name), `sheets` (picture of triggers by
            data set, which has a folder beside it with one for each attack), `data` (folder of image data sets), `cross`
            and `compare` (whether there are such pages).
    """
    page, config, by_path = Path(page), run["config"], {}
    for cell in expected:
        by_path.setdefault(cell["folder"], {**cell, "papers": []})["papers"].append(cell["paper"])
    entries: dict[str, dict] = {}
    rows, made = [], {}
    for path, part in validity(cells).groupby("path", sort=False):
        part, cell = part.drop_duplicates(["attack", "attack_variant", "defence", "variant", "metric"]), by_path[path]
        first, family = part.iloc[0], run["families"][cell["family"]]
        wide = [name for name in ("defence", "attack") if part[name].nunique() > 1]
        names = {"stage": first.stage, "data set": first.dataset, "network": first.model, "recipe": first.recipe,
                 "attack": "" if "attack" in wide else attack_name(first), "budget": first.budget, "seed": int(first.seed),
                 "method": cell.get("defence", "") or ("" if first.stage != "victim" else "no defence"),
                 "poison rate": f"{100 * first.poison_rate:g} %" if first.poison_rate > 0 else ""}
        used = settings_of(cell, family["sections"], family["entries"], config["scale"])
        named = {f"{key}|{first.dataset}|{first.model}": entry for key, entry in used.items()}
        entries |= named
        folder = Path(path)
        logs = Path("logs") / folder.relative_to(config["results"])
        logs = sorted(map(str, logs.glob("*.log"))) or sorted(map(str, logs.parent.glob("*.log")))
        name = link_to(page, path)
        metrics = [[" ".join(filter(None, [*(_variant(row, kind) for kind in wide), row.metric])), known(row.value),
                    known(row.low), known(row.high), int(row.n)] for row in part.itertuples()]
        state = (first.status if first.status != "ok" else "destroyed" if first.destroyed else
                 NO_VICTIM if not first.implanted else "unchanged" if first.unchanged else "ok")
        picture = (Path(run["sheets"][first.dataset]).with_suffix("") / f"{names['attack']}.png"
                   if first.dataset in run["sheets"] else Path())
        target = f"{path}/metrics.json"
        again = command(config, f"--force {shlex.quote(target)}", **({"jobs": "cell"} if cell["family"] == "images" else {}))
        made[name] = {"names": names, "papers": cell["papers"], "state": state,
                      "reason": str(first.reason or "") or STATES.get(state, ""), "metrics": metrics,
                      "facts": {text: known(first[key]) for key, text in FACTS.items()
                                if known(first[key]) not in (None, "", 0.0)}
                      | ({"given back": STATES["unchanged"]} if first.unchanged else {}),
                      "settings": list(named), "history": curves(path), "logs": logs, "again": again,
                      "files": sorted(file.name for file in folder.glob("*") if file.is_file()),
                      "confusion": confusion(folder, used, Path(run["data"]) / first.dataset),
                      "trigger": link_to(page, picture) if picture.is_file() else ""}
        values = {metric: value for metric, value, *_ in reversed(metrics)}
        shown = next((metric for metric in ("acc", "cp", "f1", "ata", "perplexity") if values.get(metric) is not None), None)
        attack = next((metric for metric in ("asr", "asr_template_all", "ata_beyond") if values.get(metric) is not None), None)
        rows.append({"id": name, **names, "papers": cell["papers"], "state": state, "quality": (shown, values.get(shown)),
                     "attacked": (attack, values.get(attack)), "seconds": known(first.seconds)})
    write_page(page, "cells.html.j2", scale=config["scale"], here="Cells", rows=rows,
               nav=navigation(run),
               papers=[paper["key"] for paper in run["papers"]], data={"cells": made, "settings": entries},
               choices={key: sorted({row[key] for row in rows} - {""})
                        for key in ("stage", "method", "attack", "budget", "state")})


def _variant(row, kind: str) -> str:
    variant = getattr(row, "attack_variant" if kind == "attack" else "variant")
    return f"{getattr(row, kind)} {variant}".strip()
