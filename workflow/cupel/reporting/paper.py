"""What a paper's `report.py` is given, and how it is called.

A file `workflow/papers/<key>/report.py` has one function, `draw(paper)`, that writes tables and figures through
:class:`Paper`. A paper without such a file gets `cupel.reporting.default`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pandas as pd

from cupel.files import read_json, write_text
from cupel.registry import module
from cupel.reporting import figures, tables


@dataclass(frozen=True)
class Paper:
    """One paper at one scale.

    Attributes:
        key: of its folder.
        title: for people.
        scale: name.
        cells: its rows of the tidy table (`cupel.reporting.tables.gather`).
        labels: names for people by section of experiment.yaml (`defences`, `attacks`, ...), in the order of the file.
        facts: what else experiment.yaml says and a report needs, by family.
        reported: the paper's own numbers, all rows of `reported/*.csv`.
        files: paths by kind, of what is read beside the table.
        out: folder `results/<scale>/papers/<key>`.
        registry: names for people of all defences of the family, by which each has its colour; in the order of the files.
        captions: of the figures, by stem, in the order of the page.
    """

    key: str
    title: str
    scale: str
    cells: pd.DataFrame
    labels: dict[str, dict[str, str]]
    facts: dict
    reported: pd.DataFrame
    files: dict[str, list[str]]
    out: Path
    registry: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)

    def table(self, stem: str, grid: pd.DataFrame | None, caption: str, index: str = "defence") -> None:
        """Write a table as CSV, Markdown and LaTeX, if it has entries; `index` names its rows."""
        if grid is not None and grid.size:
            tables.write_table(grid, self.out / "tables" / stem, caption, index)

    def rows(self, stem: str, frame: pd.DataFrame) -> None:
        """Write a plain table of numbers, for machines."""
        write_text(self.out / "tables" / f"{stem}.csv", frame.to_csv(index=False))

    def figure(self, stem: str, figure, caption: str) -> None:
        """Save a figure, with the numbers that it was given as CSV, and note its caption with what it rests on."""
        figures.save(figure, self.out / "figures" / f"{stem}.svg")
        self.captions[stem] = captioned(caption, self.cells, self.scale)


def captioned(text: str, cells: pd.DataFrame, scale: str) -> str:
    """A caption with what the picture rests on (`about`), and the budget where there is but one and the caption is silent."""
    budgets = sorted(set(cells.budget.dropna()) - {""})
    budget = f"Budget {budgets[0]}. " if len(budgets) == 1 and "budget" not in text else ""
    return f"{text.rstrip().removesuffix('.')}. {budget}{about(cells, scale)}"


def about(cells: pd.DataFrame, scale: str) -> str:
    """Scale, seeds, precision and samples behind a tidy table, for captions."""
    seeds, ways = sorted(set(cells.seed)), sorted({str(name) for name in cells.precision.dropna()})
    samples = cells.n[cells.n > 0]
    known = (f"Scale {scale}", f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}", " and ".join(ways),
             f"n up to {samples.max():,} test samples a cell" if len(samples) else "")
    return ", ".join(filter(None, known)) + "."


def read_reported(paths: list[str]) -> pd.DataFrame:
    """The rows of all files of published numbers; none, with the columns that reports look at, without a file."""
    none = pd.DataFrame(columns=["table", "dataset", "model", "attack", "poison_rate", "defence", "metric", "value", "source"])
    return pd.concat(map(pd.read_csv, paths), ignore_index=True) if paths else none


def load(file: str | Path) -> ModuleType:
    """A Python file in a paper's folder as a module."""
    return module(file, f"cupel_{Path(file).parent.name}_{Path(file).stem}")


def write_report(paper: Paper, file: str | Path) -> None:
    """Write `tables/` and `figures/` (with captions.json) of a paper, as `file`, a report.py, draws them."""
    for folder in ("tables", "figures"):
        (paper.out / folder).mkdir(parents=True, exist_ok=True)
    figures.register(paper.registry)
    load(file).draw(paper)
    # not sorted: the page shows the figures in this order
    write_text(paper.out / "figures" / "captions.json", json.dumps(paper.captions, indent=1, ensure_ascii=False) + "\n")


def history(folder: str | Path, name: str = "history.csv") -> pd.DataFrame:
    """history.csv, or another table, of a cell; empty where there is none."""
    file = Path(folder) / name
    return pd.read_csv(file) if file.is_file() and file.stat().st_size > 1 else pd.DataFrame()


def victim_histories(rows: pd.DataFrame, most: int | None = None) -> dict[str, pd.DataFrame]:
    """Histories of the victims in a tidy table by name, up to `most` of them."""
    victims = rows[(rows.stage == "victim") & (rows.status == "ok")].drop_duplicates("path")
    found = {f"{row.dataset} {tables.setting_name(row)}, seed {row.seed}": history(row.path) for row in victims.itertuples()}
    known = [(name, rows) for name, rows in found.items() if len(rows)]
    return dict(known[:most])


def record(folder: str | Path) -> dict:
    """metrics.json of a cell."""
    return read_json(Path(folder) / "metrics.json")
