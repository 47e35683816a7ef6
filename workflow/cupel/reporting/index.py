"""The first page of a run, and that of its claims."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from cupel.evaluation.agreement import MADE_WITH, made_with
from cupel.evaluation.claims import VERDICTS, sureness
from cupel.evaluation.settings import GATE, NOT_RUN
from cupel.files import read_json, write_json, write_text
from cupel.reporting import evidence
from cupel.reporting.page import link_to, navigation, write_page
from cupel.reporting.provenance import provenance
from cupel.reporting.terminal import duration
from cupel.reporting.timing import critical_path, rule_times
from cupel.settings import read_yaml, schema

#: rows of evidence that a claim shows; all stand in the table of cells
SHOWN = 60


def read_card(paper: dict) -> dict:
    """card.yaml of a paper; empty where it has none."""
    return read_yaml(paper["card"]) if paper["card"] else {}


def command(config: Mapping, words: str = "", **more) -> str:
    """What to type in a shell to run this again: with these words, and every setting of results that is not the default of
    config.yaml's schema."""
    def changed(given: Mapping, known: Mapping) -> dict:
        return {key: value for key, value in given.items() if value != known.get(key, {}).get("default")}

    known = schema("config")["properties"]
    data = changed(config.get("data", {}), known["data"]["properties"])
    asked = {key: value for key, value in changed({**config, "data": data}, known).items()
             if key in ("scale", "papers", "seeds", "jobs", "results", "device", "data", "plugins")} | more
    settings = [shlex.quote(f"{key}={value if isinstance(value, str) else flow(value)}") for key, value in asked.items()]
    return " ".join(["snakemake --cores all", *filter(None, [words]), "--config", *settings])


def flow(value) -> str:
    """A setting as YAML on one line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {flow(part)}' for key, part in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(flow, value))}]"
    plain = isinstance(value, str) and re.fullmatch(r"[\w./][\w./~-]*", value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def claim_entries(papers: Iterable[dict], claims: pd.DataFrame, cells: pd.DataFrame, page: Path) -> list[dict]:
    """Rows of claims.csv with the test in words, the claim's text and place, and the cells behind it."""
    root, entries = page.parent, []
    for paper in papers:
        if not paper["claims"]:
            continue
        text = Path(paper["claims"]).read_text(encoding="utf-8")
        content, own = read_yaml(paper["claims"]), cells[cells.paper == paper["key"]]
        rows = claims[claims.paper == paper["key"]].set_index("claim", drop=False)
        for claim in content["claims"]:
            row = rows.loc[claim["id"]]
            behind = evidence.cells_behind(claim, own, content.get("gate", GATE), lambda path: cell_link(path, root))
            place = f"workflow/papers/{paper['key']}/claims.yaml:{evidence.line_of(text, claim['id'])}"
            entries.append({**row.to_dict(), "sure": sureness(row), "words": evidence.in_words(claim["test"]),
                            "scales": claim["scales"], "place": place, "yaml": evidence.text_of(text, claim["id"]),
                            "cells": behind[:SHOWN], "line": claim["test"].get("margin", 0.0),
                            "more": max(0, len(behind) - SHOWN), "percent": "fraction" in row.unit})
    return entries


def cell_link(path: str, root: Path) -> str:
    """Address of a cell, for pages in the folder `root` of all results."""
    return f"cells.html#{link_to(root / 'x', path)}"


def write_index(papers: Iterable[dict], cells: pd.DataFrame, run: dict, out: Mapping[str, str]) -> None:
    """Write the first page, the page of claims, the claims of all papers as one table, and provenance.json.

    Args:
        papers: `key`, `title`, `reference`, `note`, `gate`, `folder`, and paths of `card` and `claims` (their YAML), if any.
        cells: the tidy table.
        run: `config`, `root` (the repository), `data` (folder) and `datasets` (names), `seeds`, `benchmarks` (folder),
            `sheets` (pictures of triggers), `budgets` (scales that run a budget, by name), `cross` (cross.csv, if any),
            and `compare` (whether there is a page that compares this run with another).
        out: paths `page`, `claims_page`, `claims` and `provenance`.
    """
    papers, page = list(papers), Path(out["page"])
    cards = {paper["key"]: read_card(paper) for paper in papers}
    claims = pd.concat([pd.read_csv(Path(paper["folder"]) / "claims.csv") for paper in papers], ignore_index=True)
    config = json.loads(json.dumps(run["config"], default=str))
    made = provenance(run["root"], config, run["data"], names=run["datasets"], seeds=run["seeds"])
    write_json(out["provenance"], made)
    write_text(out["claims"], claims.to_csv(index=False))
    claims = claims.fillna({"direction": "", "least_in": "", "test": "", "source": ""})
    common = {"scale": config["scale"], "nav": navigation({**run, "papers": papers})}
    ways = cells.drop_duplicates("path")[MADE_WITH].dropna().drop_duplicates()
    failed = [{"path": link_to(page, row.path), "href": cell_link(row.path, page.parent), "reason": row.reason}
              for row in cells[cells.status == "failed"].drop_duplicates("path").itertuples()]
    waiting = cells[cells.status == NOT_RUN].path.nunique()
    effects = {paper["key"]: evidence.switch_effects(cards[paper["key"]], cells[cells.paper == paper["key"]], paper["gate"])
               for paper in papers}
    cross = pd.read_csv(run["cross"], dtype={"attack_variant": str}) if run["cross"] else pd.DataFrame()
    entries = claim_entries(papers, claims, cells, page)
    by_claim = {(entry["paper"], entry["claim"]): entry for entry in entries}
    captions = read_json(page.parent / "cross" / "captions.json") if run["cross"] else {}
    write_page(page, "index.html.j2", **common, here="Overview", papers=papers, made=made, computed=made_with(cells),
               mixed=len(ways) > 1, cells=cells.path.nunique(), verdicts=VERDICTS, board=evidence.board(claims, cards),
               findings=[by_claim[row.paper, row.claim] for row in evidence.findings(claims, cards)],
               buys=evidence.best_buys(cross.fillna({"attack_variant": ""}), run["budgets"]) if len(cross) else [],
               effects=effects, missing=evidence.not_reproduced(claims, cards), failed=failed, waiting=waiting,
               cross=bool(run["cross"]), overview=captions.get("overview", ""),
               command=command(config), deposit=command(config, "crate"),
               triggers=[{"path": link_to(page, path), "name": Path(path).stem.removeprefix("triggers_")}
                         for path in run["sheets"]],
               times=rule_times(run["benchmarks"]).set_index("rule").round(1),
               chain=critical_path(run["benchmarks"]), duration=duration)
    write_page(out["claims_page"], "claims.html.j2", **common, here="Claims", verdicts=VERDICTS,
               papers=[paper["key"] for paper in papers], claims=entries)
