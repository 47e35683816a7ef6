"""Tables and figures of Invertible Pruning Masks, its stages, the sweep over the inner step: how far perturbations reach."""

import pandas as pd

from cupel.reporting import images, tables
from cupel.reporting.figures import lines
from cupel.reporting.paper import Paper, history


def draw(paper: Paper) -> None:
    """What every paper on image classifiers shows, the stages of IMS, and where several steps were run, their reach."""
    images.draw(paper)
    # how far the inner steps can move a pixel
    reach = {name: entry["settings"]["lr_perturb"] * entry["settings"]["steps_perturb"]
             for name, entry in paper.facts["defences"].items() if entry["function"] == "ims"}
    own, table = images.prepared(paper)
    for names, part in table[table.method.isin(reach)].groupby([*images.PLACE, "budget"], sort=False):
        paper.table(f"stages_{'_'.join(names)}", stages(part), f"IMS after each stage, in percent with 95 % intervals of the "
                    f"finite test set ({', '.join(names)}). In the second λ is 0; the third brings it back.",
                    "setting: defence")
    runs = own[(own.metric == "asr") & own.method.isin(reach) & (own.status == "ok")]
    flips = tables.summary(runs.assign(metric="flips", value=[flip_rate(path) for path in runs.path], low=float("nan"),
                                high=float("nan")))
    rows = pd.concat([table[table.method.isin(reach)], flips])
    shown = {"asr": "ASR", "ra": "RA", "acc": "ACC", "flips": "predictions flipped by δ"}
    rows = rows.assign(reach=rows.method.map(reach), setting=[tables.setting_name(row) for row in rows.itertuples()])
    for names, part in rows.groupby([*images.PLACE, "budget"], sort=False):
        if part.reach.nunique() > 2:
            figure = lines(part, "reach", shown, "setting", xlabel="step × number of steps")
            figure.axes[0].axvline(0.02, color="grey", ls=":", lw=1)  # of the released settings
            paper.figure(f"reach_{'_'.join(names)}", figure, "The inner problem of IMS: how far its steps can move a pixel, "
                         "what is left of the backdoor, and how often they change the victim's prediction. "
                         f"({', '.join(names)}, mean over {int(part.seeds.max())} seed(s))")


def stages(table: pd.DataFrame) -> pd.DataFrame:
    """ASR, ACC and RA after each stage; what counts as the result of the defence is that after the third.

    Args:
        table: `cupel.reporting.tables.summary`, with the metrics `asr_stage_1` and so on.
    """
    rate, number = table.metric.str.extract("^(asr|acc|ra)(?:_stage_([12]))?$").T.values
    rows = tables.with_texts(table.assign(rate=rate, stage=number)).dropna(subset="rate")
    rows["stage"] = "after " + rows.stage.map({"1": "I", "2": "II"}).fillna("III")
    rows["row"] = [f"{tables.setting_name(row)}: {row.label}" for row in rows.itertuples()]
    rows["rate"] = rows.rate.str.upper()
    across = [(rate, f"after {stage}") for rate in ("ASR", "ACC", "RA") for stage in ("I", "II", "III")]
    return tables.spread(rows, "row", ["rate", "stage"], across=across)


def flip_rate(folder: str) -> float:
    """How often the perturbations of a run changed the victim's prediction, mean over the rounds that have any."""
    return history(folder).get("flip_rate", pd.Series(dtype=float)).mean()
