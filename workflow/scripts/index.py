"""The first page: claims, tables, figures, failed cells, provenance."""

import hashlib
import json
import os
from pathlib import Path

import pandas as pd

from cupel.files import read_json, write_json, write_text
from cupel.job import logged
from cupel.reporting.page import write_page
from cupel.reporting.provenance import provenance, rule_times

CAPTIONS = {
    "scatter": "Clean accuracy against attack success: good defences stand top left.",
    "asr": "Attack success rate by defence and poison rate.",
    "acc": "Clean accuracy by defence and poison rate.",
    "ra": "Recovery: triggered images that are given their true class again.",
    "families": "Pruning against fine-tuning: a point is a setting, a bar the mean with its 95 % interval over settings.",
    "recovery": "Recovery of triggered images, mean over settings with a 95 % bootstrap interval; the cross is the mean ACC.",
    "budgets": "Sensitivity to the number of clean samples.",
    "reach": "The inner problem of IMS: how far its steps can move a pixel, what is left of the backdoor, and how often "
    "they change the victim's prediction.",
    "training": "Training of the victims: loss, accuracy on clean samples, share of poisoned samples that hit the target.",
}


def caption(path):
    kind, _, rest = path.stem.partition("_")
    return CAPTIONS.get(kind, path.stem) + (f" ({rest.replace('_', ', ')})" if rest else "")


with logged(snakemake.log[0]):
    page = Path(snakemake.output.page)
    relative = lambda path: os.path.relpath(path, page.parent)
    claims = pd.concat([pd.read_csv(path) for path in snakemake.input.claims], ignore_index=True)
    cells = pd.read_parquet(snakemake.input.cells)
    papers = []
    for paper in snakemake.params.papers:
        folder = Path(paper["folder"])
        texts = read_json(folder / "figures" / "captions.json") if (folder / "figures" / "captions.json").is_file() else {}
        order = {name: k for k, name in enumerate(texts or CAPTIONS)}
        pictures = sorted(
            (folder / "figures").glob("*.png"),
            key=lambda path: order.get(path.stem if texts else path.stem.partition("_")[0], 99),
        )
        figures = [{"path": relative(path), "caption": texts.get(path.stem) or caption(path)} for path in pictures]
        figures += [{**picture, "path": relative(picture["path"])} for picture in paper["pictures"]]
        tables = []
        for path in sorted((folder / "tables").glob("*.md")):
            grid = pd.read_csv(path.with_suffix(".csv"), index_col=0, dtype=str)
            tables.append({"frame": grid, "caption": path.read_text().splitlines()[0]})
        links = [
            {"path": relative(folder / "report.html"), "text": "notebook"},
            {"path": relative(folder / "card.md"), "text": "card"},
            {"path": relative(folder / "claims.csv"), "text": "claims"},
            {"path": relative(folder / "tables"), "text": "tables (CSV, Markdown, LaTeX)"},
        ]
        papers.append({**paper, "tables": tables, "figures": figures, "links": links})
    failed = cells[cells.status != "ok"].drop_duplicates("path")[["path", "reason"]].to_dict("records")
    config = json.loads(json.dumps(snakemake.params.config, default=str))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    made = provenance(
        snakemake.params.root, config, digest, snakemake.params.data, snakemake.params.datasets, snakemake.params.seeds
    )
    times = rule_times(snakemake.params.benchmarks).set_index("rule").round(1)
    triggers = [
        {
            "path": relative(path),
            "caption": f"Triggers on {Path(path).stem.removeprefix('triggers_')}: stamped test "
            "images, and the difference to the clean ones, ten times amplified around grey.",
        }
        for path in snakemake.input.sheets
    ]
    write_json(snakemake.output.provenance, made)
    write_text(snakemake.output.claims, claims.to_csv(index=False))
    write_page(
        page,
        "index.html.j2",
        scale=snakemake.params.scale,
        claims=claims.to_dict("records"),
        papers=papers,
        cross=bool(snakemake.input.cross),
        triggers=triggers,
        failed=failed,
        made=made,
        times=times,
    )
