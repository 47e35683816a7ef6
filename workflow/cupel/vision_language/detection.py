"""What every filter would remove from a poisoned training set, from its entropies: no network is needed.

One job measures all filters of a victim, for each takes seconds. Its record has a row per filter and number (see
`cupel.reporting.tables.gather`); what a filter removes stands in a file of its own, so that fitting again depends on the
decision of one filter alone.
"""

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cupel import cells, job
from cupel.cells import METHOD_ERRORS
from cupel.files import read_json, write_json
from cupel.vision_language import baselines, filter, scoring
from cupel.vision_language.poison import truth

SCALED = "scaled"  # a threshold of 0.708 · ln T instead of 4.5 nats
#: of `scoring.detection`, those that become rows; then those of BYE's own account
DETECTED = ("precision", "recall", "f1", "auroc", "false_alarm", "flagged", "poisoned", "samples", "left", "left_share")
HAZARDS = ("majority_removed", "non_monotone", "sensitive_layers")


def decide(function: str, hyperparameters: dict, entropies: np.ndarray, *, poisoned: np.ndarray, seed: int,
           image_tokens: int) -> tuple[np.ndarray, np.ndarray | None, dict | None]:
    """What a filter flags.

    Args:
        function: `bye`, or a key of `baselines.FLAGGERS`.
        hyperparameters: of it; a `threshold` may be `scaled`.
        entropies: float [N, L].
        poisoned: bool [N], for the oracle alone.
        seed: of random filters.
        image_tokens: T.

    Returns:
        flagged bool [N]; the score that it looks at, float64 [N], lower for more suspicious, or None where it has none (a
        random filter, no sensitive layer); for `bye` the record of `filter.run`.
    """
    given = dict(hyperparameters)
    if given.get("threshold") == SCALED:
        given["threshold"] = baselines.threshold_for(image_tokens)
    if function == "bye":
        found = filter.run(entropies, taus=(), **given)
        return found.flagged, found.score, found.record
    if function in ("random_drop", "oracle"):
        given["seed"] = seed
    if function == "oracle":
        given["poisoned"] = poisoned
    flagged = baselines.FLAGGERS[function](entropies, **given)
    score = None
    if function in ("fixed_threshold", "without_bsi"):
        score = filter.filled(entropies)[0].mean(1)
    elif function in ("two_means", "without_gmm"):
        score = filter.run(entropies, taus=(), **{key: given[key] for key in ("rule", "tau") if key in given}).score
    return flagged, score, None


def sweep(entropies: np.ndarray, taus: list[float], poisoned: np.ndarray) -> list[dict]:
    """BYE at several thresholds of its layer test, by both rules: rule, tau, sensitive layers, and the detection."""
    values = filter.filled(entropies)[0]
    known: dict[tuple[int, ...], dict] = {}
    found = []
    for entry in filter.run(entropies, taus=taus).record["sweep"]:
        layers = tuple(entry["sensitive"])
        if layers not in known:
            score = values[:, layers].mean(1) if layers else None
            flagged = filter.mixture(score).low if layers else np.zeros(len(values), bool)
            known[layers] = scoring.detection(flagged, poisoned, -score if layers else None)
        found.append({**entry, **known[layers]})
    return found


def read_entropies(path: str | Path) -> np.ndarray:
    """float64 [N, L] of the parquet file that `entropy.extract` wrote, without importing what can make one."""
    import pandas as pd

    table = pd.read_parquet(path)
    return table[[f"layer_{k}" for k in range(len(table.columns) - 1)]].to_numpy(np.float64)


def rows_of(detected: dict, **override) -> list[dict]:
    """Rows of the tidy table from a flat record of detection."""
    return [{"metric": name, "value": float(detected[name]),
             **{key: detected[f"{name}_{key}"] for key in ("n", "low", "high") if f"{name}_{key}" in detected}, **override}
            for name in (*DETECTED, *HAZARDS) if name in detected]


def measure_filters(spec: dict, filters: dict[str, dict], taus: list[float], entropies: str, attention: str, poisoned: str,
                    outputs: dict) -> None:
    """Let every filter decide, compare with the truth, and write decisions and records.

    Args:
        spec: of the victim.
        filters: name to function and hyperparameters (`Plan.filters`).
        taus: for the sweep; none: no sweep.
        entropies, attention: outputs of `attention.read_attention`.
        poisoned: folder of the poisoned training set.
        outputs: paths `flags` (name to JSON with the indices a filter removes), `record` (what figures need) and `metrics`.
    """
    started = time.perf_counter()
    base = cells.identity(spec, "filtered")
    looked = read_json(attention)
    if "failed" in looked:
        for path in outputs["flags"].values():
            write_json(path, looked)
        write_json(outputs["record"], looked)
        write_json(outputs["metrics"], {**base, "status": "failed", "reason": looked["failed"], "metrics": ["f1"]})
        return
    values, bad = read_entropies(entropies), truth(poisoned)
    made = read_json(Path(poisoned) / "poison.json")
    rows, accounts = [], {}
    for name, entry in filters.items():
        method, _, variant = name.partition("~")
        place = {"defence": method, "variant": variant}
        try:
            flagged, score, record = decide(entry["function"], entry["hyperparameters"], values, poisoned=bad,
                                            seed=spec["seed"], image_tokens=looked["image_tokens"])
        except METHOD_ERRORS as error:
            reason = cells.failure(error)
            write_json(outputs["flags"][name], {"failed": reason})
            rows.append({"metric": "f1", **place, "status": "failed", "reason": reason})
            continue
        detected = scoring.detection(flagged, bad, None if score is None else -score)
        hazards = filter.Hazards.of(flagged, score)
        detected |= {"majority_removed": hazards.majority_removed, "non_monotone": hazards.non_monotone}
        if record:
            detected["sensitive_layers"] = len(record["sensitive"])
        rows += rows_of(detected, **place)
        accounts[name] = {**entry, "detection": detected, "hazards": asdict(hazards), "record": record}
        write_json(outputs["flags"][name], {"flagged": np.flatnonzero(flagged).tolist(), "of": len(flagged)})
    swept = sweep(values, taus, bad) if taus else []
    for entry in swept:
        detected = {**entry, "sensitive_layers": len(entry["sensitive"])}
        rows += rows_of(detected, defence="bye", variant=f"{entry['rule']}_tau{entry['tau']:g}")
    layers = [{"layer": k, **filter.mixture(column).record(), "auroc": auroc(column, bad)}
              for k, column in enumerate(filter.filled(values)[0].T)]
    write_json(outputs["record"], {"filters": accounts, "sweep": swept, "layers": layers, "attention": looked,
                                   "poisoned": np.flatnonzero(bad).tolist(), "unchanged": len(made["unchanged"])})
    write_json(outputs["metrics"], {**base, **job.peak_memory(), "status": "ok", "rows": rows,
                                    "rate_reached": made["count"] / made["total"], "clean_samples": 0,
                                    "seconds": looked["seconds"] + time.perf_counter() - started})


def auroc(entropies: np.ndarray, poisoned: np.ndarray) -> float | None:
    """How well low entropy in one layer tells poisoned samples; None without both kinds."""
    return scoring.detection(np.zeros(len(poisoned), bool), poisoned, -entropies).get("auroc")
