"""The page of one paper."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from cupel.evaluation.settings import NOT_RUN
from cupel.files import read_json
from cupel.reporting.evidence import board, switch_effects
from cupel.reporting.index import read_card
from cupel.reporting.page import link_to, navigation, write_page
from cupel.reporting.paper import captioned


def paper_section(paper: dict, cells: pd.DataFrame, scale: str, page: Path) -> dict:
    """What the page shows of a paper's tables and figures.

    Args:
        paper: `folder`, and `pictures` that other rules drew (path and caption), of one cell where they lie in its folder.
        cells: the paper's rows of the tidy table.
        scale: of the run.
        page: which is to refer to them.
    """
    folder = Path(paper["folder"])
    captions = read_json(folder / "figures" / "captions.json")
    figures = {folder / "figures" / f"{stem}.svg": text for stem, text in captions.items()}
    for path, text in ((Path(picture["path"]), picture["caption"]) for picture in paper["pictures"]):
        own = cells[cells.path == str(path.parent)]
        figures[path] = captioned(text, own if len(own) else cells, scale)
    tables = [{"frame": pd.read_csv(path.with_suffix(".csv"), index_col=0, dtype=str, keep_default_na=False),
               "caption": path.read_text().splitlines()[0], "csv": link_to(page, path.with_suffix(".csv"))}
              for path in sorted((folder / "tables").glob("*.md"))]
    return {"tables": tables, "figures": [
        {"caption": text, "path": link_to(page, path),
         "data": link_to(page, data) if (data := path.with_suffix(".csv")).is_file() else ""}
        for path, text in figures.items()]}


def write_paper_page(paper: dict, cells: pd.DataFrame, run: Mapping, page: str | Path) -> None:
    """Write the page.

    Args:
        paper: `key`, `title`, `reference`, `note`, `gate`, `folder`, `pictures`, and paths of `card` and `claims` (their
            YAML), if any.
        cells: its rows of the tidy table.
        run: `scale`, `papers` (all, with their keys), `cross` and `compare` (whether there are such pages).
    """
    page, card = Path(page), read_card(paper)
    claims = pd.read_csv(Path(paper["folder"]) / "claims.csv").fillna({"direction": ""})
    write_page(page, "paper.html.j2", scale=run["scale"], here=paper["key"], paper=paper, card=card,
               nav=navigation(run, "../../"), seeds=cells.seed.nunique(), cells=cells.path.nunique(),
               counts=board(claims, [paper["key"]])[0]["counts"], failed=cells[cells.status == "failed"].path.nunique(),
               waiting=cells[cells.status == NOT_RUN].path.nunique(),
               effects=switch_effects(card, cells, paper["gate"]),
               claims=[{**row._asdict(), "percent": "fraction" in row.unit} for row in claims.itertuples()],
               files=[("report.ipynb", "the notebook, executed"), ("card.md", "the card"), ("claims.csv", "verdicts")],
               **paper_section(paper, cells, run["scale"], page))
