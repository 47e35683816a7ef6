"""The zoo: one victim of every attack beside its clean twin."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from cupel.files import write_text
from cupel.reporting.figures import lines, save
from cupel.reporting.page import write_page
from cupel.reporting.paper import record
from cupel.reporting.provenance import git_commit, processor, versions
from cupel.reporting.tables import gather


def victims_beside_twins(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per victim: rate asked for and reached, ACC beside that of the clean twin, ASR with its interval, RA.

    Args:
        cells: the tidy table; the twin of a victim is the clean one of the same data set, model, recipe and seed.
    """
    keys = ["dataset", "model", "recipe", "seed"]
    named = ["dataset", "model", "recipe", "attack", "attack_variant", "poison_rate", "rate_reached", "seed", "status",
             "reason", "seconds"]
    attacked, clean = cells[cells.attack != "clean"], cells[(cells.attack == "clean") & (cells.metric == "acc")]
    wide = attacked.pivot(index="path", columns="metric", values=["value", "low", "high", "n"])
    columns = {**{metric: ("value", metric) for metric in ("acc", "asr", "ra")}, "asr_low": ("low", "asr"),
               "asr_high": ("high", "asr"), "n": ("n", "asr")}
    numbers = wide.reindex(columns=list(columns.values())).set_axis(list(columns), axis=1).astype({"n": int})
    table = attacked.drop_duplicates("path").merge(clean[[*keys, "value"]].rename(columns={"value": "acc_twin"}), how="left",
                                                   on=keys)
    table = table[[*named, "path", "acc_twin"]].join(numbers, on="path")
    return table.assign(acc_loss=table.acc_twin - table.acc)[[*named, *columns, "acc_twin", "acc_loss", "path"]]


def write_zoo(cells: list[dict], sheets: Iterable[str], out: Mapping[str, str], *, scale: str, root: str | Path) -> None:
    """Write the table of victims, the figure of ASR by epochs, and the page that shows them with the triggers.

    `cells` are victims with their folders, `sheets` pictures of triggers; `out` has the paths `page`, `table` and `figure`.
    """
    table = victims_beside_twins(gather(cells))
    epochs = table.path.map({path: record(path).get("epochs") for path in table.path})
    write_text(out["table"], table.to_csv(index=False))
    points = table.assign(epochs=epochs, metric="asr").rename(columns={"asr": "value", "asr_low": "low", "asr_high": "high"})
    save(lines(points[points.status == "ok"], "epochs", {"asr": "ASR"}, "attack", xscale="linear"), out["figure"])
    made = {"commit": git_commit(root), "processor": processor(), "versions": versions()}
    write_page(out["page"], "zoo.html.j2", scale=scale, nav=[],
               rows=table.to_dict("records"), made=made,
               sheets=[os.path.relpath(path, Path(out["page"]).parent) for path in sheets])
