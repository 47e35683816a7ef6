"""A whole site from made-up cells: every cell of a grid, nothing trained."""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from cupel.evaluation.claims import judge_all
from cupel.evaluation.intervals import wilson
from cupel.evaluation.metrics import der
from cupel.experiment import Grid
from cupel.files import write_json, write_text
from cupel.paths import Paths
from cupel.reporting.cellpage import write_cells
from cupel.reporting.compare import write_comparison
from cupel.reporting.cross import write_cross
from cupel.reporting.figures import plt, save
from cupel.reporting.index import write_index
from cupel.reporting.notebook import write_card
from cupel.reporting.page import navigation
from cupel.reporting.paper import Paper, read_reported, write_report
from cupel.reporting.paperpage import write_paper_page
from cupel.reporting.planning import HERE, report_file
from cupel.reporting.tables import gather
from cupel.settings import PAPERS, read_yaml

FIVE = ("fst", "ims", "bye", "crow", "proper_interpretability")
#: made-up rates by family and stage
RATES = {"images": ("acc", "asr", "ra"), "vision_language": ("cp", "asr", "asr_contains", "f1", "false_alarm", "auroc"),
         "text": ("asr_template_all", "asr_template", "asr_template_careful", "false_template_all", "asr_bare"),
         "robust": ("acc", "ata_train", "ata_beyond", "bound_violated")}


def rate(value: float, n: int, name: str = "") -> dict:
    low, high = wilson(round(value * n), n)
    bounds = {f"{name}_{key}".strip("_"): value for key, value in (("n", n), ("low", low), ("high", high))}
    return {name or "value": value, **bounds}


def write_cell(folder: Path, cell: dict, draw: np.random.Generator, number: int) -> None:
    """metrics.json and history.csv of a cell; every eleventh purified one failed."""
    (attack, _, attack_variant), (defence, _, variant) = (cell.get(n, "").partition("~") for n in ("attack", "defence"))
    purified = cell["stage"] not in ("victim", "trained")
    record = {**{name: cell.get(name, "") for name in ("stage", "dataset", "model", "recipe", "budget")}, "attack": attack,
              "attack_variant": attack_variant, "defence": defence, "variant": variant, "poison_rate": float(cell["rate"]),
              "seed": int(cell["seed"]), "status": "ok", "seconds": 2.0 + 60 * draw.random() * purified, "device": "cpu",
              "precision": "bf16", "threads": 1, "rate_reached": float(cell["rate"]), "peak_memory_mb": 900.0}
    names = [name for name in RATES[cell["family"]] if attack != "clean" or name == "acc"]
    record["metrics"] = names
    if purified and number % 11 == 10:
        record |= {"status": "failed", "reason": "Diverged: <b> | loss at step 3"}
    else:
        record["unchanged"] = purified and number % 7 == 3
        for name in names:
            strong = {"fst": 0.05, "ims": 0.1, "crow": 0.1, "ft": 0.7, "finetune": 0.8, "ft_sam": 0.15}.get(defence, 0.4)
            value = (0.02 + 0.05 * draw.random() if name.startswith("false") or name == "bound_violated"
                     else (strong if purified else 0.95) + 0.04 * draw.random() if name.startswith("asr")
                     else 0.85 + 0.05 * draw.random() - 0.06 * purified * draw.random() if name in ("acc", "cp", "auroc", "f1")
                     else 0.5 + 0.1 * draw.random())
            record |= rate(min(round(500 * value), 500) / 500, 500, name)
        if cell["family"] == "images":
            clean = np.full((10, 10), 1) + 41 * np.eye(10, dtype=int)
            triggered = np.full((10, 10), 2) + 25 * np.eye(10, dtype=int)[0]
            triggered[0] = 0  # there are no triggered images of the target class
            record["confusion"] = {"clean": clean.tolist(), **({"triggered": triggered.tolist()} if attack != "clean" else {})}
        if purified and cell["family"] == "images":
            record |= {"arr": 0.1, "clean_samples": {"spc2": 20, "spc10": 100}.get(cell["budget"], 500)}
            if attack != "clean":
                record |= {"der": der(0.88, record["acc"], 0.97, record["asr"]), "rdr": 0.4}
                record["metrics"] = [*names, "der", "arr", "rdr"]
    write_json(folder / "metrics.json", record)
    history = pd.DataFrame({"epoch": [1, 2, 3], "loss": [2.0, 1.2, 1.0], "acc": [0.4, 0.6, 0.8]})
    history.to_csv(folder / "history.csv", index=False)


def write_another(run: Path) -> Path:
    """The tables of another run: as the first, but that FST failed, CROW lost its cells, and one claim flipped."""
    other = run.with_name("another") / run.name
    cells, claims = pd.read_parquet(run / "cells.parquet"), pd.read_csv(run / "claims.csv")
    cells.loc[cells.defence == "fst", "value"] = 1.0
    cells = cells[cells.defence != "crow"].assign(threads=2.0)
    judged = claims.index[claims.verdict == "indicated"]
    claims.loc[judged[0], ["verdict", "direction"]] = "open", ""
    claims.loc[judged[1], "direction"] = "against" if claims.direction[judged[1]] == "for" else "for"
    other.mkdir(parents=True)
    cells.to_parquet(other / "cells.parquet")
    claims.to_csv(other / "claims.csv", index=False)
    return other


def make_site(root: Path, papers=FIVE, scale="demo", seeds=None) -> Path:
    """Write results/<scale> below `root` as the workflow's rules do; the path of its first page."""
    grid, paths, draw = Grid(papers, scale, seeds), Paths("results", scale, "data"), np.random.default_rng(0)
    before = Path.cwd()
    os.chdir(root)
    try:
        out = Path(paths.root)
        expected = [{**cell, "folder": paths.cell(cell)} for paper in papers for cell in grid.of_paper(paper)]
        for number, cell in enumerate({cell["folder"]: cell for cell in expected}.values()):
            write_cell(Path(cell["folder"]), cell, draw, number)
        cells = gather(expected)
        cells.to_parquet(out / "cells.parquet")
        images = grid.papers_of("images")
        sheets = {name: out / "figures" / f"triggers_{name}.png" for name in grid.families["images"].used("dataset")}
        (out / "figures").mkdir()
        for sheet in sheets.values():
            save(plt.figure(figsize=(4, 2)), sheet)
            save(plt.figure(figsize=(4, 2)), sheet.with_suffix("") / "badnets.png")
            write_json(root / "data" / "images" / sheet.stem.removeprefix("triggers_") / "manifest.json",
                       {"classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]})
        site = {"scale": scale, "papers": [{"key": paper} for paper in papers], "cross": bool(images), "compare": True}
        headers = []
        for key in papers:
            family, folder = grid.family(key), out / "papers" / key
            file = report_file(key) if family.NAME == "images" else HERE / "default.py"
            paper = Paper(key=key, title=grid.experiments[key]["title"], scale=scale, cells=cells[cells.paper == key], files={},
                          labels=family.report_labels(key), facts=family.facts(key, paths), out=folder,
                          reported=read_reported(sorted(map(str, (PAPERS / key / "reported").glob("*.csv")))),
                          registry=list(family.labels("defences").values()))
            write_report(paper, file)
            card, claims = (str(PAPERS / key / f"{name}.yaml") for name in ("card", "claims"))
            write_text(folder / "claims.csv", judge_all(read_yaml(claims), cells, key, scale).to_csv(index=False))
            write_card(card, folder / "card.md")
            write_json(folder / "report.ipynb", {})
            headers.append({"key": key, "title": paper.title, "reference": grid.experiments[key]["reference"],
                            "note": "a note of `x` < y", "folder": str(folder), "pictures": [], "gate": grid.gate(key),
                            "card": card, "claims": claims})
        labels = {name: label for key in images for name, label in grid.family(key).report_labels(key)["defences"].items()}
        if images:
            write_cross(cells[cells.paper.isin(images)], labels, {**site, "registry": list(
                grid.families["images"].labels("defences").values())}, {"page": out / "cross.html", "table": out / "cross.csv",
                                                                        "figures": out / "cross"})
        config = {"scale": scale, "papers": list(papers), "results": "results"}
        families = {name: {"sections": family.SECTIONS, "entries": family.entries} for name, family in grid.families.items()}
        write_cells(cells, expected, {**site, "config": config, "data": "data/images", "families": families, "sheets": sheets},
                    out / "cells.html")
        for header in headers:
            write_paper_page(header, cells[cells.paper == header["key"]], site, Path(header["folder"]) / "report.html")
        budgets = {"spc10": ["bench", "paper"], "heldout": ["demo"]}
        write_index(headers, cells, {
            "config": config, "root": str(PAPERS.parents[1]), "data": "data", "datasets": [], "seeds": sorted(set(cells.seed)),
            "benchmarks": "results/benchmark", "sheets": list(sheets.values()), "budgets": budgets,
            "compare": True, "cross": str(out / "cross.csv") if images else ""}, {
                "page": out / "index.html", "claims_page": out / "claims.html", "claims": out / "claims.csv",
                "provenance": out / "provenance.json"})
        write_comparison([out, write_another(out)], out, navigation(site))
        return (out / "index.html").resolve()
    finally:
        os.chdir(before)


if __name__ == "__main__":
    import sys

    Path(sys.argv[1]).mkdir(parents=True)
    print(make_site(Path(sys.argv[1])))
