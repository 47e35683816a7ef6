"""The first page of a run: claims, tables, figures, failed cells, provenance."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from cupel.evaluation.agreement import MADE_WITH, made_with
from cupel.files import read_json, write_json, write_text
from cupel.reporting.page import write_page
from cupel.reporting.provenance import provenance, rule_times


def paper_section(paper: dict, page: Path) -> dict:
    """What the page shows of a paper.

    Args:
        paper: `key`, `title`, `reference`, `note`, `folder`, and `pictures` that other rules drew (path and caption).
        page: which is to refer to them.
    """
    folder = Path(paper["folder"])
    captions = read_json(folder / "figures" / "captions.json")
    figures = [{"path": folder / "figures" / f"{stem}.png", "caption": text} for stem, text in captions.items()]
    figures += paper["pictures"]
    tables = [{"frame": pd.read_csv(path.with_suffix(".csv"), index_col=0, dtype=str),
               "caption": path.read_text().splitlines()[0]} for path in sorted((folder / "tables").glob("*.md"))]
    links = {"report.html": "notebook", "card.md": "card", "claims.csv": "claims", "tables": "tables (CSV, Markdown, LaTeX)"}
    return {**paper, "tables": tables,
            "figures": [{**figure, "path": os.path.relpath(figure["path"], page.parent)} for figure in figures],
            "links": [{"path": os.path.relpath(folder / name, page.parent), "text": text} for name, text in links.items()]}


def write_index(papers: Iterable[dict], cells: pd.DataFrame, run: dict, out: Mapping[str, str]) -> None:
    """Write the page, the claims of all papers as one table, and provenance.json.

    Args:
        papers: see `paper_section`.
        cells: the tidy table.
        run: `config`, `root` (the repository), `data` (folder) and `datasets` (names), `seeds`, `benchmarks` (folder),
            `sheets` (pictures of triggers), `cross` (whether there is a cross table).
        out: paths `page`, `claims` and `provenance`.
    """
    papers, page = list(papers), Path(out["page"])
    claims = pd.concat([pd.read_csv(Path(paper["folder"]) / "claims.csv") for paper in papers], ignore_index=True)
    config = json.loads(json.dumps(run["config"], default=str))
    made = provenance(run["root"], config, run["data"], names=run["datasets"], seeds=run["seeds"])
    write_json(out["provenance"], made)
    write_text(out["claims"], claims.to_csv(index=False))
    triggers = [{"path": os.path.relpath(path, page.parent),
                 "caption": f"Triggers on {Path(path).stem.removeprefix('triggers_')}: stamped test images, and the difference "
                            "to the clean ones, ten times amplified around grey."} for path in run["sheets"]]
    failed = cells[cells.status != "ok"].drop_duplicates("path")[["path", "reason"]].to_dict("records")
    ways = cells.drop_duplicates("path")[MADE_WITH].dropna().drop_duplicates()
    write_page(page, "index.html.j2", scale=config["scale"], computed=made_with(cells), mixed=len(ways) > 1,
               claims=claims.to_dict("records"), cross=run["cross"],
               papers=[paper_section(paper, page) for paper in papers], triggers=triggers, failed=failed, made=made,
               times=rule_times(run["benchmarks"]).set_index("rule").round(1))
