"""What every filter would remove from a poisoned training set, from its entropies: no network is needed.

One job measures all filters of a victim, for each takes seconds. Its record has a row per filter and number (see
`cupel.reporting.tables.gather`); what a filter removes stands in a file of its own, so that fitting again depends on the
decision of one filter alone.
"""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd

from cupel import cells, job
from cupel.files import read_json, reading, write_json
from cupel.vision_language import filters, scoring
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.poison import truth

#: of `scoring.detection`, those that become rows; then those of BYE's own account
DETECTED = ("precision", "recall", "f1", "auroc", "false_alarm", "flagged", "poisoned", "samples", "left", "left_share")
HAZARDS = ("majority_removed", "non_monotone", "sensitive_layers")


def sweep(evidence: filters.Evidence, taus: list[float]) -> list[dict]:
    """BYE at several thresholds of its layer test, by both rules: rule, tau, sensitive layers, and the detection."""
    found = []
    for rule in ("rss", "sum"):
        for tau in taus:
            sensitive = evidence.sensitive(rule, tau)
            score, second = evidence.aggregated(sensitive)
            flagged = second.low if second else evidence.none()
            numbers = scoring.detection(flagged, evidence.poisoned, score)
            found.append({"rule": rule, "tau": tau, "sensitive": list(sensitive), **numbers})
    return found


def rows_of(numbers: dict, **override) -> list[dict]:
    """Rows of the tidy table from a flat record of detection."""
    return [{"metric": name, "value": float(numbers[name]),
             **{key: numbers[f"{name}_{key}"] for key in ("n", "low", "high") if f"{name}_{key}" in numbers}, **override}
            for name in (*DETECTED, *HAZARDS) if name in numbers]


def measure_filters(spec: dict, asked: dict, inputs: Inputs, outputs: dict) -> None:
    """Let every filter decide, compare with the truth, and write decisions and records.

    Args:
        spec: of the victim.
        asked: `filters`, name to function and hyperparameters (`Plan.filters`), and `taus` for the sweep; none: no sweep.
        inputs: `entropies` and `attention`, of `attention.read_attention`, and `poisoned`.
        outputs: paths `flags` (name to JSON with the indices a filter removes), `record` (what figures need) and `metrics`.
    """
    started = time.perf_counter()
    base = cells.identity(spec, "filtered")
    try:
        looked = read_json(inputs.attention)
        if "failed" in looked:
            raise ValueError(looked["failed"])
        bad, made = truth(inputs.poisoned), read_json(Path(inputs.poisoned) / "poison.json")
        with reading(inputs.entropies):
            table = pd.read_parquet(inputs.entropies)
        evidence = filters.Evidence(filters.matrix(table), image_tokens=looked["image_tokens"], seed=spec["seed"], poisoned=bad,
                                    others={name: filters.matrix(table, name) for name in filters.MEASURES[1:]})
        layers, swept = evidence.layers, sweep(evidence, asked["taus"])
    except Exception as error:
        failed = cells.failure(error)
        for path in (*outputs["flags"].values(), outputs["record"]):
            write_json(path, {"failed": failed})
        write_json(outputs["metrics"], {**base, "status": "failed", "reason": failed, "metrics": ["f1"]})
        return
    rows, accounts = [], {}
    for name, entry in asked["filters"].items():
        method, _, variant = name.partition("~")
        place = {"defence": method, "variant": variant, "defence_parameters": json.dumps(entry["settings"], sort_keys=True)}
        try:
            decision = filters.decide(entry["function"], evidence, **entry["settings"])
            hazards = filters.hazards(decision)
            numbers = scoring.detection(decision.flagged, bad, decision.score) | {
                key: hazards[key] for key in ("majority_removed", "non_monotone")}
            if "sensitive" in (decision.record or {}):
                numbers["sensitive_layers"] = len(decision.record["sensitive"])
            account = {**entry, "detection": numbers, "hazards": hazards, "record": decision.record}
            json.dumps(account, allow_nan=False)
        except Exception as error:
            reason = cells.failure(error)
            write_json(outputs["flags"][name], {"failed": reason})
            rows.append({"metric": "f1", **place, "status": "failed", "reason": reason})
            continue
        rows += rows_of(numbers, **place)
        accounts[name] = account
        write_json(outputs["flags"][name], {"flagged": np.flatnonzero(decision.flagged).tolist(), "of": len(bad)})
    for entry in swept:
        rows += rows_of({**entry, "sensitive_layers": len(entry["sensitive"])}, defence="bye",
                        variant=f"{entry['rule']}_tau{entry['tau']:g}",
                        defence_parameters=json.dumps({key: entry[key] for key in ("rule", "tau")}))
    layers = [{"layer": k, **layer.record(), "auroc": scoring.detection(evidence.none(), bad, column).get("auroc")}
              for k, (layer, column) in enumerate(zip(layers, evidence.values.T, strict=True))]
    write_json(outputs["record"], {"filters": accounts, "sweep": swept, "layers": layers, "attention": looked,
                                   "poisoned": np.flatnonzero(bad).tolist(), "unchanged": len(made["unchanged"])})
    write_json(outputs["metrics"], {**base, **job.costs(), "status": "ok", "rows": rows,
                                    "rate_reached": made["count"] / made["total"], "clean_samples": 0,
                                    "seconds": looked["seconds"] + time.perf_counter() - started})
