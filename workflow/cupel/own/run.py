"""Purify a network of the user: measure it, run defences on it, measure again, and write what they leave."""

import copy
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from cupel.cells import write_history
from cupel.evaluation.intervals import wilson
from cupel.evaluation.metrics import KEPT, Rate, destroyed, rates
from cupel.files import write_text
from cupel.images.attacks import Attack
from cupel.images.attacks.base import changed
from cupel.images.datasets import Dataset
from cupel.images.defences import DEFENCES, Budget
from cupel.images.defences import purify as defend
from cupel.own import LABELS
from cupel.own import evidence as look
from cupel.own.data import arrays, parts
from cupel.own.imports import write_plain
from cupel.own.network import NORMALISATIONS, Own, per_channel, wrap
from cupel.registry import unknown
from cupel.rng import rng
from cupel.training.engine import predict, to_pixels, upload

#: run where none are named, cheapest first: pruning without training, then with, then tuning, then IMS
USUAL = ("clp", "bnp", "rnp", "fst", "ims")
#: work on the scale γ and the running statistics of BatchNorm layers
NORMS = {"anp", "awn", "bnp", "clp", "mm_bd", "nft", "rnp"}
EVIDENCE = ("mm_bd", "nc", "bti_dbf")


class NearChance(ValueError):
    """The network hardly does better than guessing on the clean images, so that nothing measured on it would mean anything."""


@dataclass
class Purified:
    """What `purify` found.

    Attributes:
        table: a row per defence, and first `none`, the network as it was given: ACC, agreement with the original, with a
            trigger ASR and RA, each a fraction with n and a 95 % interval (Wilson); seconds; `result` in words.
        networks: by defence, of the class that was given.
        evidence: by method, what was found without a trigger; empty with one.
        page: the report, if a folder was given.
    """

    table: pd.DataFrame
    networks: dict[str, nn.Module]
    evidence: dict = field(default_factory=dict)
    page: Path | None = None


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def triggered(trigger: Attack | Callable, data: Dataset, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stamped images, wanted and true labels, as `Attack.test_set` gives them; a plain function stamps uint8 [N, H, W, C].

    Raises:
        ValueError: what comes back has another form, or changes no image.
    """
    trigger = trigger() if isinstance(trigger, type) else trigger
    if isinstance(trigger, Attack):
        return trigger.test_set(data, target)
    others = data.labels != target
    if not others.any():
        raise ValueError(f"all clean images are of the target class {target}: ASR cannot be measured")
    images, true = data.images[others], data.labels[others]
    return changed(images, np.asarray(trigger(images.copy()))), np.full_like(true, target), true


def usual_faults(model: Own, data: Dataset, found: float) -> list[str]:
    """What makes the network much better on some of the clean images, in words: other normalisation, channels, classes."""
    few = data.take(np.linspace(0, len(data) - 1, min(len(data), 400)).astype(int))
    device = next(model.parameters()).device

    def accuracy(network, images) -> float:
        return float((predict(network, images, device=device).argmax(1) == few.labels).mean())

    better, channels = [], few.images.shape[-1]
    other = copy.deepcopy(model)
    for name, values in NORMALISATIONS.items():
        if len(values[0]) in (1, channels):
            for buffer, value in zip((other.normalize.mean, other.normalize.std), values, strict=True):
                buffer.copy_(torch.tensor(per_channel(value, channels, name)).view(-1, 1, 1))
            better.append((accuracy(other, few.images), f"with the normalisation {name!r}"))
    if channels == 3:
        better.append((accuracy(model, np.ascontiguousarray(few.images[..., ::-1])), "with the channels as blue, green, red"))
    from scipy.optimize import linear_sum_assignment

    classes = model.found.classes
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (few.labels, predict(model, few.images, device=device).argmax(1)), 1)
    better.append((confusion[linear_sum_assignment(-confusion)].sum() / len(few), "with the classes in another order"))
    margin = max(0.03, 3 * np.sqrt(max(found * (1 - found), 0.01) / len(few)))
    better = sorted((pair for pair in better if pair[0] > found + margin), reverse=True)
    return [f"{text} it is {100 * value:.1f} %" for value, text in better]


def checked(model: Own, clean: Dataset, tuning: Dataset) -> None:
    """Say the ACC on all clean images, and stop where it is near chance.

    Raises:
        ValueError: a label that the network does not have.
        NearChance: see there.
    """
    classes = model.found.classes
    if clean.labels.max() >= classes:
        raise ValueError(f"labels go up to {clean.labels.max()}, and the network has {classes} outputs")
    if lacking := sorted(set(range(classes)) - set(clean.labels.tolist())):
        say(f"no clean image is of the classes {', '.join(map(str, lacking[:10]))}{' ...' if lacking[10:] else ''}: "
            "what a defence does to them is not measured")
    right = predict(model, clean.images, device=next(model.parameters()).device).argmax(1) == clean.labels
    rate = Rate(int(right.sum()), len(right))
    low, high = wilson(rate.successes, rate.n)
    say(f"ACC on {len(right)} clean images: {100 * rate.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
    hints = usual_faults(model, tuning, rate.value)
    if rate.value < 1 / classes + 0.1 * (1 - 1 / classes):
        text = (f"ACC is {100 * rate.value:.1f} % and guessing gives {100 / classes:.1f} %: nothing is run. Usual causes are "
                "another normalisation, another order of the classes, blue and red exchanged, or weights of another network")
        raise NearChance(f"{text}. On some of the images: {'; '.join(hints)}" if hints else text)
    for hint in hints:
        say(f"this may be too low: {hint}")


def refusal(model: Own, name: str) -> str:
    """Why a defence cannot work on a network, empty where nothing is known against it."""
    norms = [(key, module) for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if name in NORMS and not norms:
        return "it works on BatchNorm2d layers, and this network has none"
    for key, norm in norms if name in NORMS else ():
        if not (norm.affine and norm.track_running_stats):
            return f"it works on scale and statistics of BatchNorm2d layers, and {key.removeprefix('network.')} lacks them"
    return ""


def note_on(history: list[dict]) -> str:
    """A sentence on a penalty that decided the tuning instead of the images; see `cupel.images.defences.tuning.Penalty`."""
    last = history[-1] if history else {}
    if "penalty" in last and abs(last["penalty"]) > 5 * abs(last["loss"] - last["penalty"]):
        return "its penalty dwarfs the cross-entropy on this network: try a smaller alpha"
    return ""


class Measure:
    """Measures networks on the images that no defence sees."""

    def __init__(self, original: Own, data: Dataset, trigger=None, target: int | None = None):
        self.data, self.device = data, next(original.parameters()).device
        self.before = self._predict(original, data.images)
        self.stamped, self.wanted, self.true = triggered(trigger, data, target) if trigger is not None else (None,) * 3
        self.reversed = None

    def _predict(self, model: Own, images: np.ndarray) -> np.ndarray:
        return predict(model, images, device=self.device).argmax(1)

    def follow(self, target: int, mask: np.ndarray, pattern: np.ndarray) -> None:
        """Measure from now on how often a reversed trigger sends images of other classes to `target`, too."""
        self.reversed = look.stamped(self.data.images[self.data.labels != target], mask, pattern), target

    def __call__(self, model: Own) -> dict:
        """A flat record."""
        clean = self._predict(model, self.data.images)
        found = {"agreement": Rate(int((clean == self.before).sum()), len(clean))}
        none = np.zeros(0, np.int64)
        attacked = (none,) * 3
        if self.stamped is not None:
            attacked = self._predict(model, self.stamped), self.wanted, self.true
        found = {**rates(clean, self.data.labels, *attacked), **found}
        if self.stamped is None:
            del found["asr"], found["ra"]
        if self.reversed:
            images, target = self.reversed
            found["reversed"] = Rate(int((self._predict(model, images) == target).sum()), len(images))
        return {key: value for name, rate in found.items() for key, value in rate.record(name).items()}


def gathered(model: Own, budget: Budget, measure: Measure, methods: Iterable[str], seed: int) -> dict:
    """Evidence on the network as it was given; where Neural Cleanse is among it, its smallest trigger is followed."""
    found = {}
    for method in methods:
        try:
            if method == "nc":
                rows, masks, patterns = look.neural_cleanse(model, budget, seed)
                successful = [row for row in rows if row["found"]] or rows
                smallest = min(successful, key=lambda row: row["mask_norm"])["class"]
                measure.follow(smallest, masks[smallest], patterns[smallest])
                found["nc"] = {"rows": rows, "class": smallest, "mask": masks[smallest], "pattern": patterns[smallest]}
            elif method == "mm_bd":
                rows, p = look.margins(model, budget, seed)
                found["mm_bd"] = {"rows": rows, "class": max(rows, key=lambda row: row["margin"])["class"], "p": p}
            else:
                say("evidence: a generator of trigger images is trained (BTI-DBF)")
                found["bti_dbf"] = {"class": look.decoupled(model, budget, seed)}
        except (ValueError, ArithmeticError, RuntimeError) as error:
            found[method] = {"failed": str(error)}
            say(f"evidence of {method} could not be had: {error}")
    return found


def purify(model: nn.Module, images, labels, *, trigger: Attack | Callable | None = None, target: int | None = None,
           defences: Sequence[str] = USUAL, settings: Mapping[str, Mapping] | None = None, mean: Sequence[float] = (0.0,),
           std: Sequence[float] = (1.0,), head: str = "", measured_on: tuple | None = None, tuning: float = 0.5,
           crop: int | None = None, flip: bool = True, evidence: Sequence[str] | None = None, seed: int = 0,
           device: str = "auto", out: str | Path | None = None,
           write: Callable[[nn.Module, Path], Path] = write_plain) -> Purified:
    """Run defences on a network of yours with clean images of yours.

    Args:
        model: any network that gives logits [B, K] of images float [B, C, H, W]; it is moved to float32, else left as it is.
        images: clean ones, uint8 [N, H, W, C] or another form that `cupel.own.data.arrays` takes, not normalised.
        labels: their true classes, integers [N].
        trigger: what stamps uint8 [N, H, W, C]: a function or a `cupel.images.attacks.Attack`; None: unknown.
        target: label that the attacker wants; needed with a trigger.
        defences: names, run in this order.
        settings: hyperparameters by defence, else those of the papers: `{"fst": {"alpha": 0.001}}`.
        mean, std: of the normalisation before the network, one value or one a channel.
        head: name of the last linear layer, where it is not found by itself.
        measured_on: images and labels to measure on, where all of `images` are for tuning.
        tuning: else, the share of each class that is tuned on; the rest measures.
        crop, flip: augmentation while tuning: padding of the random crop in pixels (None: an eighth of the side), mirroring.
        evidence: methods of `EVIDENCE` for a look without a trigger; None: all where there is no trigger, else none.
        seed: of all randomness.
        device: `cpu`, `cuda`, or `auto`.
        out: folder for checkpoints, `results.csv`, histories and the page. A killed run that is repeated goes on.
        write: writes a purified network to a path whose suffix it chooses, and returns that; default: its `state_dict`.

    Raises:
        ValueError: the model or the images cannot be used; the text says why.
        NearChance: the network does hardly better than guessing on them.
    """
    if trigger is not None and target is None:
        raise ValueError("a trigger was given without the label that the attacker wants (target)")
    chosen = {name: DEFENCES.settings(name, (settings or {}).get(name, {})) for name in defences}
    if surplus := sorted(set(settings or {}) - set(chosen)):
        raise ValueError(f"settings are given for {', '.join(surplus)}, which is not among the defences {', '.join(chosen)}")
    evidence = (() if trigger is not None else EVIDENCE) if evidence is None else evidence
    for name in evidence:
        if name not in EVIDENCE:
            raise ValueError(unknown("evidence", name, EVIDENCE))
    clean = arrays(images, labels)
    tuned, held = (clean, arrays(*measured_on)) if measured_on is not None else parts(clean, tuning, seed)
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    original = wrap(copy.deepcopy(model).to(device), to_pixels(upload(clean.images[:4], device)), mean, std, head)
    checked(original, clean, tuned)
    if target is not None and not 0 <= target < original.found.classes:
        raise ValueError(f"target {target}: the network has the classes 0 to {original.found.classes - 1}")
    say(f"{len(tuned)} images are tuned on, {len(held)} others measure")
    out = Path(out) if out else None
    budget = Budget(tuned.images, tuned.labels, original.found.classes, device=device, flip=flip,
                    crop=clean.image_size // 8 if crop is None else crop)
    measure = Measure(original, held, trigger, target)
    found = gathered(original, budget, measure, evidence, seed)
    rows, networks = [{"defence": "none", "result": "as it was given", **measure(original)}], {}
    for name, hyperparameters in chosen.items():
        say(f"{name}:")
        row, network, path = {"defence": name}, None, None
        started = time.perf_counter()
        try:
            if reason := refusal(original, name):
                raise ValueError(reason)
            work = Budget(**{**vars(budget), "checkpoint": str(out / "work" / f"{name}.pt") if out else None, "details": {},
                             "snapshots": {}})
            result, history = defend(name, original, work, rng(seed, "own", name), **hyperparameters)
            seconds = time.perf_counter() - started
            if out and not len(result.attachments):  # what is written is measured, rounded as it may be
                path = write(result.network, out / f"purified_{name}")
            row |= {"seconds": seconds, **measure(result), "file": path.name if path else ""}
            row["result"] = worded(rows[0], row, note_on(history))
            if len(result.attachments):
                row["result"] += "; no checkpoint: it adds modules that your code does not have"
            else:
                network = result.network
            if out:
                write_history(out / f"history_{name}.csv", history)
        except Exception as error:  # the rest runs; what went wrong stands in the table and in the log
            if not isinstance(error, (ValueError, ArithmeticError)):
                traceback.print_exc()
            row = {"defence": name, "result": f"failed: {' '.join(str(error).split()) or type(error).__name__}"}
            if path:
                path.unlink()
        if network is not None:
            networks[name] = network.cpu().eval()
        rows.append(row)
        say("  " + sentence(row))
    table = pd.DataFrame(rows)
    report = Purified(table, networks, found)
    if out:
        from cupel.own.page import write_report

        write_text(out / "results.csv", table.to_csv(index=False))
        report.page = write_report(out, report, {
            "network": type(model).__name__, "classes": original.found.classes, "tuned": len(tuned), "held": len(held),
            "trigger": trigger is not None, "target": target, "seed": seed, "device": device,
            "settings": {name: dict(values) for name, values in (settings or {}).items()}})
        shutil.rmtree(out / "work", ignore_errors=True)
    return report


def worded(before: dict, after: dict, note: str) -> str:
    """What a defence did, in words."""
    if destroyed(before, after):
        found = f"destroyed: ACC is below {100 * KEPT:.0f} % of what it was"
    elif after["agreement"] == 1 and after.get("asr", 0) == before.get("asr", 0):
        found = "no prediction changed"
    else:
        found = "ok"
    return f"{found}; {note}" if note else found


def sentence(row: dict) -> str:
    """A row of the table as a line of text."""
    if "acc" not in row:
        return row["result"]
    numbers = ", ".join(f"{label} {100 * row[key]:.1f} %" for key, label in LABELS.items() if key in row)
    return f"{numbers}; {row['result']}" + (f"; {row['seconds']:.0f} s" if "seconds" in row else "")
