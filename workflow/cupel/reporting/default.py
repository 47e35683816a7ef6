"""The report of a paper that has no `report.py` of its own: every metric by setting, and one figure."""

import pandas as pd

from cupel.reporting import figures, tables
from cupel.reporting.paper import Paper


def draw(paper: Paper) -> None:
    """For each data set, model, recipe and budget a table of all metrics with their intervals, and a figure of the first rate.

    What has no budget of its own, such as a victim, stands beside every one.
    """
    labels = {name: label for section in paper.labels.values() for name, label in section.items()}
    table = tables.attach_reported(tables.summary(tables.with_names(paper.cells, labels)), paper.reported)
    paper.rows("cells", table.drop(columns="label"))
    for names, part in table.groupby(["dataset", "model", "recipe"], sort=False):
        for budget in dict.fromkeys(part.budget[part.budget != ""]) or [""]:
            _draw(paper, part[part.budget.isin(["", budget])], [name for name in (*names, budget) if name])


def _draw(paper: Paper, part: pd.DataFrame, names: list[str]) -> None:
    stem = "_".join(names)
    place = f"{', '.join(names)}, mean over {int(part.seeds.max())} seed(s)"
    rows = tables.with_texts(part).assign(row=[f"{tables.setting_name(row)}: {row.label}" for row in part.itertuples()])
    paper.table(f"metrics_{stem}", tables.spread(rows, "row", "metric"),
                f"{paper.title}: every metric with its 95 % interval; rates in percent; {place}, scale {paper.scale}.",
                "setting: defence")
    rates = part[(part.n > 0) & (part.attack != "clean")]
    if len(rates):
        metric = "asr" if (rates.metric == "asr").any() else rates.metric.iloc[0]
        shown = rates[rates.metric == metric]
        paper.figure(f"{metric}_{stem}", figures.bars_by_rate(shown, list(dict.fromkeys(shown.label)), metric),
                     f"{metric.upper()} by defence and poison rate, with 95 % intervals ({place}).")
