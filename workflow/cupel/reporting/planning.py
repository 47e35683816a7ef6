"""What the workflow must know of reports before any job runs: which file draws them, and which cells a figure shows.

Imported to plan, so nothing heavy is imported here.
"""

from pathlib import Path

from cupel.settings import PAPERS

HERE = Path(__file__).parent


def report_file(key: str) -> Path:
    """The `report.py` of a paper; the default where it has none."""
    file = PAPERS / key / "report.py"
    return file if file.is_file() else HERE / "default.py"


def notebook_file(key: str) -> Path:
    """The `report.ipynb` of a paper; the default where it has none."""
    file = PAPERS / key / "report.ipynb"
    return file if file.is_file() else HERE / "report.ipynb"


def feature_cells(victims: list[dict], purified: list[dict], defences: list[str]) -> list[tuple[str, str, dict]]:
    """What the figure of features shows: per attack the victim at the highest and the lowest rate, and some defences.

    Args:
        victims, purified: cells of one paper. Those of the first victim's data set, network, recipe and seed are shown.
        defences: names; of the victim at the lowest rate.

    Returns:
        Attack, title and cell of each panel.
    """
    victims = [cell for cell in victims if cell["attack"] != "clean"]
    same = [c for c in victims if all(c[k] == victims[0][k] for k in ("dataset", "model", "recipe", "seed"))]
    shown = []
    for attack in dict.fromkeys(c["attack"] for c in same if "~" not in c["attack"]):
        rates = sorted((c for c in same if c["attack"] == attack), key=lambda c: float(c["rate"]))
        names = {key: rates[0][key] for key in rates[0] if key not in ("stage", "paper")}
        tuned = [c for c in purified if c["defence"] in defences and names.items() <= c.items()]
        shown += [(attack, "victim", cell) for cell in ([rates[-1], rates[0]] if len(rates) > 1 else rates)]
        shown += [(attack, cell["defence"].upper(), cell) for cell in tuned]
    return [(attack, f"{title}, {100 * float(cell['rate']):g} %", cell) for attack, title, cell in shown]
