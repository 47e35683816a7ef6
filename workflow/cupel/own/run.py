"""Purify a network of the user: measure it, run defences on it, measure again, and write what they leave."""

import contextlib
import copy
import functools
import glob
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cupel import locks
from cupel.cells import MACHINE_ERRORS, MACHINE_WORDS, write_history
from cupel.evaluation.intervals import wilson
from cupel.evaluation.metrics import KEPT, Rate, confusion, destroyed
from cupel.images.attacks import Attack
from cupel.images.defences import DEFENCES, Budget
from cupel.images.defences import purify as defend
from cupel.images.stages import answers, evaluate
from cupel.limits import check
from cupel.own import LABELS, USUAL, device_of
from cupel.own import evidence as look
from cupel.own.data import arrays, parts
from cupel.own.imports import write_plain
from cupel.own.network import Own, wrap
from cupel.own.normalisations import NORMALISATIONS
from cupel.own.page import write_report
from cupel.registry import one_of
from cupel.rng import rng
from cupel.training.engine import to_pixels, upload

#: set a part of the images aside, where a class has two
CHOOSERS = {"anp", "fp"}
#: differentiate twice, which torch's fast attention cannot
TWICE = {"i_bau"}
#: work on the scale γ and the running statistics of BatchNorm layers
NORMS = {"anp", "awn", "bnp", "clp", "mm_bd", "nft", "rnp"}


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
        reversed: the smallest trigger that Neural Cleanse found, if it was asked: `class`, `mask` float [H, W, 1] and
            `pattern` float [H, W, C] in [0, 1].
        page: the report, if a folder was given.
    """

    table: pd.DataFrame
    networks: dict[str, nn.Module]
    evidence: dict = field(default_factory=dict)
    reversed: dict = field(default_factory=dict)
    page: Path | None = None


@dataclass(frozen=True)
class Function(Attack):
    """A trigger that is a plain function from uint8 [N, H, W, C] to the same."""

    function: Callable | None = None

    def stamp(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.function(images.copy()))


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


class Study:
    """What all defences on one network share: the network, clean images to tune on and others to measure on, the trigger.

    Args:
        model: any network that gives logits [B, K] of images float [B, C, H, W]; a copy of it is used, in float32.
        images: clean ones, uint8 [N, H, W, C] or another form that `cupel.own.data.arrays` takes, not normalised.
        labels: their true classes, integers [N].
        trigger: what stamps uint8 [N, H, W, C]: a function or a `cupel.images.attacks.Attack`; None: unknown.
        target: label that the attacker wants; needed with a trigger.
        mean, std: of the normalisation before the network, one value or one a channel.
        head: name of the last linear layer, where it is not found by itself.
        measured_on: images and labels to measure on, where all of `images` are for tuning.
        tuning: else, the share of each class that is for tuning; the rest measures.
        spc: at most so many images of each class are tuned on; None: all of those for tuning.
        crop, flip: augmentation while tuning: padding of the random crop in pixels (None: an eighth of the side), mirroring.
        seed: of all randomness.
        device: `cpu`, `cuda`, or `auto`.

    Raises:
        ValueError: the model or the images cannot be used; the text says why.
    """

    def __init__(self, model: nn.Module, images, labels, *, trigger: Attack | Callable | None = None,
                 target: int | None = None, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,), head: str = "",
                 measured_on: tuple | None = None, tuning: float = 0.5, spc: int | None = None, crop: int | None = None,
                 flip: bool = True, seed: int = 0, device: str = "auto"):
        if trigger is not None and target is None:
            raise ValueError("a trigger was given without the label that the attacker wants (target)")
        for name, value in (("seed", seed), ("crop", crop)):
            if value is not None and value < 0:
                raise ValueError(f"{name} {value}: it must be at least 0")
        if tuning == 1 and measured_on is None:
            raise ValueError("tuning 1: no image is left to measure on; give others for that (--measure), or a smaller share")
        self.seed, self.target, self.kind, self.reversed = seed, target, type(model).__name__, {}
        self.device = device_of(device)
        self.clean = arrays(images, labels)
        tuned, held = parts(self.clean, tuning if measured_on is None else 1.0, spc, seed)
        held = held if measured_on is None else arrays(*measured_on)
        pixels = to_pixels(upload(self.clean.images[:4], self.device))
        self.original = wrap(copy.deepcopy(model).to(self.device), pixels, mean, std, head)
        self.classes = self.original.found.classes
        for data in (self.clean, held):
            if data.labels.max() >= self.classes:
                raise ValueError(f"labels go up to {data.labels.max()}, and the network has {self.classes} outputs")
        if target is not None and not 0 <= target < self.classes:
            raise ValueError(f"target {target}: the network has the classes 0 to {self.classes - 1}")
        self.held = replace(held, classes=tuple(map(str, range(self.classes))))
        self.budget = Budget(tuned.images, tuned.labels, self.classes, device=self.device, flip=flip,
                             crop=self.clean.image_size // 8 if crop is None else crop)
        trigger = trigger() if isinstance(trigger, type) else trigger
        self.attack = trigger if trigger is None or isinstance(trigger, Attack) else Function(function=trigger)
        if trigger is not None and (self.held.labels == target).all():
            raise ValueError(f"all images to measure on are of the target class {target}: ASR cannot be measured")

    def answers(self, model: nn.Module, images: np.ndarray) -> np.ndarray:
        """Predicted classes int64 [N]."""
        return answers(model, images, self.classes, self.device, "fp32")

    def check(self) -> None:
        """Say the ACC on all clean images, and what may be wrong; stop where it is near chance.

        Raises:
            NearChance: see there.
        """
        data, classes = self.clean, self.classes
        if lacking := sorted(set(range(classes)) - set(data.labels.tolist())):
            say(f"no clean image is of the classes {', '.join(map(str, lacking[:10]))}{' ...' if lacking[10:] else ''}: "
                "what a defence does to them is not measured")
        right, n = int((self.answers(self.original, data.images) == data.labels).sum()), len(data)
        low, high = wilson(right, n)
        say(f"ACC on {n} clean images: {100 * right / n:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
        hints = self._usual_faults(right / n)
        if right / n < 1 / classes + 0.1 * (1 - 1 / classes):
            text = (f"ACC is {100 * right / n:.1f} % and guessing gives {100 / classes:.1f} %: nothing is run. Usual causes "
                    "are another normalisation, another order of the classes, blue and red exchanged, or weights of another "
                    "network")
            raise NearChance(f"{text}. On some of the images: {'; '.join(hints)}" if hints else text)
        for hint in hints:
            say(f"this may be too low: {hint}")
        say(f"{len(self.budget)} images are tuned on, {len(self.held)} others measure")

    def _usual_faults(self, found: float) -> list[str]:
        """What makes the network much better on some of the images to tune on: other normalisation, channels, classes."""
        few = np.linspace(0, len(self.budget) - 1, min(len(self.budget), 400)).astype(int)
        images, labels = self.budget.images[few], self.budget.labels[few]
        given, channels, better = self.answers(self.original, images), images.shape[-1], []
        other = copy.deepcopy(self.original)
        for name, values in NORMALISATIONS.items():
            if len(values[0]) in (1, channels):
                other.normalize.mean[:, 0, 0], other.normalize.std[:, 0, 0] = map(torch.tensor, values)
                better.append(((self.answers(other, images) == labels).mean(), f"with the normalisation {name!r}"))
        if channels == 3:
            exchanged = self.answers(self.original, np.ascontiguousarray(images[..., ::-1]))
            better.append(((exchanged == labels).mean(), "with the channels as blue, green, red"))
        counts = confusion(labels, given, self.classes)
        better.append((counts[linear_sum_assignment(-counts)].sum() / len(few), "with the classes in another order"))
        margin = max(0.03, 3 * np.sqrt(max(found * (1 - found), 0.01) / len(few)))
        return [f"{text} it is {100 * value:.1f} %" for value, text in sorted(better, reverse=True) if value > found + margin]

    def look(self, methods: Iterable[str] | None) -> dict:
        """Evidence on the network as it was given; the smallest trigger of Neural Cleanse is measured from then on.

        Args:
            methods: names; None: all where there is no trigger, else none.

        Raises:
            ValueError: a method is unknown.
        """
        methods = list((look.METHODS if self.attack is None else ()) if methods is None else methods)
        for name in methods:
            one_of("evidence", name, look.METHODS)
        found = {}
        for name in methods:
            try:
                found[name] = look.METHODS[name](self.original, self.budget, self.seed)
            except Exception as error:  # the rest runs
                found[name] = {"failed": reason(error)}
                say(f"evidence of {name} could not be had: {found[name]['failed']}")
        if "mask" in found.get("nc", {}):
            self.reversed = {"class": found["nc"]["class"], **{key: found["nc"].pop(key) for key in ("mask", "pattern")}}
        return found

    def measured(self, model: Own) -> dict:
        """Rates of a network on images that no defence sees, as a flat record."""
        found, taken = evaluate(model, self.held, self.attack, self.target, self.device, precision="fp32")
        same = taken["clean"][1] == self.before
        found |= Rate(int(same.sum()), len(same)).record("agreement")
        others = self.held.labels != self.reversed["class"] if self.reversed else ()
        if any(others):
            images = self.held.images[others]
            reached = self.answers(model, look.stamped(images, self.reversed["mask"], self.reversed["pattern"]))
            found |= Rate(int((reached == self.reversed["class"]).sum()), len(images)).record("reversed")
        return found

    @functools.cached_property
    def before(self) -> np.ndarray:
        """What the network as it was given takes the images to measure on for, int64 [N]."""
        return self.answers(self.original, self.held.images)

    @functools.cached_property
    def given(self) -> dict:
        """The row of the network as it was given."""
        return {"defence": "none", "result": "as it was given", **self.measured(self.original)}

    def run(self, name: str, hyperparameters: Mapping, out: Path | None, write: Callable) -> tuple[dict, nn.Module | None]:
        """Run a defence, and write what it makes of the network, which is then measured as it was written.

        Args:
            name: of the defence, perhaps with a variant behind `~`, which is in names of files alone.

        Returns:
            The row of the table, and the network; None where it has modules that the user's code does not have.

        Raises:
            Exception: whatever the defence raises.
        """
        function, work, path = name.partition("~")[0], out and out / "work" / name, None
        for old in out.glob(f"purified_{glob.escape(name)}.*") if out else ():
            old.unlink()
        refuse(function, self.original, self.budget.labels)
        budget = replace(self.budget, checkpoint=str(work / "checkpoint.pt") if work else None, details={}, snapshots={})
        started = time.perf_counter()
        with sdpa_kernel(SDPBackend.MATH) if function in TWICE else contextlib.nullcontext():
            result, history = defend(function, self.original, budget, rng(self.seed, "own", function), **hyperparameters)
        seconds, plain = time.perf_counter() - started, not len(result.attachments)
        if out and plain:
            path = write(result.network, work / f"purified_{name}")
        row = {"defence": name, "seconds": seconds, **self.measured(result), "file": path.name if path else ""}
        row["result"] = worded(self.given, row, history)
        if not plain:
            row["result"] += "; no checkpoint: it adds modules that your code does not have"
        if out:
            write_history(out / f"history_{name}.csv", history)
            if path:
                os.replace(path, out / path.name)
        return row, result.network.cpu().eval() if plain else None

    def facts(self) -> dict:
        """What the page says of how its numbers were made, but for the settings of defences."""
        return {"network": self.kind, "classes": self.classes, "tuned": len(self.budget), "held": len(self.held),
                "trigger": self.attack is not None, "target": self.target, "seed": self.seed, "device": self.device}


def purify(model: nn.Module, images, labels, *, defences: Sequence[str] = USUAL,
           settings: Mapping[str, Mapping] | None = None, evidence: Sequence[str] | None = None,
           out: str | Path | None = None, write: Callable[[nn.Module, Path], Path] = write_plain, **study) -> Purified:
    """Run defences on a network of yours with clean images of yours.

    Args:
        model, images, labels: see `Study`.
        defences: names, run in this order; `fst~low` is `fst` with settings of its own.
        settings: hyperparameters by defence, else those of the papers: `{"fst": {"alpha": 0.001}}`.
        evidence: `mm_bd`, `nc`, `bti_dbf`: a look without a trigger; None: all where there is no trigger, else none.
        out: folder for checkpoints, `results.csv`, histories and the page. A killed run that is repeated goes on.
        write: writes a purified network to a path whose suffix it chooses, and returns that; default: its `state_dict`.
        study: as `Study` takes it: `trigger`, `target`, `mean`, `std`, `head`, `measured_on`, `tuning`, `spc`, `crop`, `flip`,
            `seed`, `device`.

    Raises:
        ValueError: the model or the images cannot be used; the text says why.
        NearChance: the network does hardly better than guessing on them.
        Exception: an error of the machine's, such as a full disk; one of a defence's is its row.
    """
    settings = {name: dict((settings or {}).get(name, {})) for name in [*defences, *(settings or {})]}
    for name, given in settings.items():
        function, _, variant = name.partition("~")
        DEFENCES.settings(function, given)
        check("images", "defences", function, DEFENCES[function], given)
        if not re.fullmatch("[a-z0-9_]*", variant):
            raise ValueError(f"{name!r}: behind ~ stand lower-case letters, digits and _")
    if surplus := sorted(set(settings) - set(defences)):
        raise ValueError(f"settings are given for {', '.join(surplus)}, which is not among the defences {', '.join(defences)}")
    case, out = Study(model, images, labels, **study), Path(out) if out else None
    case.check()
    with locks.alone(out) if out else contextlib.nullcontext():
        found = case.look(evidence)
        rows, networks = [case.given], {}
        for name, given in settings.items():
            say(f"{name}:")
            try:
                row, network = case.run(name, given, out, write)
            except Exception as error:  # the rest runs
                row, network = failed(name, error), None
            if network is not None:
                networks[name] = network
            rows.append(row)
            say("  " + sentence(row))
        table = pd.DataFrame(rows)
        report = Purified(table, networks, found, case.reversed)
        if out:
            report.page = write_report(out, table, found, case.reversed, {**case.facts(), "settings": settings})
            shutil.rmtree(out / "work", ignore_errors=True)
    return report


def refuse(name: str, model: Own, labels: np.ndarray) -> None:
    """Raise what is known against a defence on a network with clean images of these labels.

    Raises:
        ValueError: it needs a part that the network lacks, or more images.
    """
    if name in CHOOSERS and np.bincount(labels).max() < 2:
        raise ValueError("it sets images of each class aside to choose by, and no class has two to tune on")
    if name not in NORMS:
        return
    norms = [(key, module) for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        raise ValueError("it works on BatchNorm2d layers, and this network has none")
    for key, norm in norms:
        if not (norm.affine and norm.track_running_stats):
            raise ValueError("it works on scale and statistics of BatchNorm2d layers, and "
                             f"{key.removeprefix('network.')} lacks them")


def reason(error: Exception) -> str:
    """What a method failed with; what is no refusal but a fault is traced in the log.

    Raises:
        Exception: the error itself, where it is the machine's.
    """
    if isinstance(error, MACHINE_ERRORS) or MACHINE_WORDS.search(str(error)):
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    if missing := re.match(r"derivative for aten::(\w+)_backward is not implemented", text):
        text = f"it needs second derivatives, and torch has none of {missing[1]}, which this network uses"
    elif not isinstance(error, (ValueError, ArithmeticError)):
        traceback.print_exception(error)
    return text


def failed(name: str, error: Exception) -> dict:
    """The row of a defence that could not be run; see `reason`."""
    return {"defence": name, "result": f"failed: {reason(error)}"}


def worded(before: dict, after: dict, history: list[dict]) -> str:
    """What a defence did, in words; also where a penalty decided the tuning and not the images (`tuning.Penalty`)."""
    last = history[-1] if history else {}
    if destroyed(before, after):
        found = f"destroyed: ACC is below {100 * KEPT:.0f} % of what it was"
    elif all(after.get(key) == before.get(key) for key in LABELS):
        found = "nothing that was measured changed"
    else:
        found = "ok"
    if "penalty" in last and abs(last["penalty"]) > 5 * abs(last["loss"] - last["penalty"]):
        found += "; its penalty dwarfs the cross-entropy on this network: try a smaller alpha"
    return found


def sentence(row: dict) -> str:
    """A row of the table as a line of text."""
    if "acc" not in row:
        return row["result"]
    numbers = ", ".join(f"{label} {100 * row[key]:.1f} %" for key, label in LABELS.items() if key in row)
    return f"{numbers}; {row['result']}" + (f"; {row['seconds']:.0f} s" if "seconds" in row else "")
