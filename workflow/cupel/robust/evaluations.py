"""What a trained network is measured with: one function per experiment of proper_interpretability SPEC 8, from a network
to rows and arrays.

Every function takes a `Subject` and the parameters that experiment.yaml gives it, and returns `Found`: rows for the tidy
table (`attack`, `attack_variant`, `metric`, `value`, `n`, `low`, `high`) and arrays for the pictures. Counted rates have
their number of points n and a Wilson interval; other numbers have n = 0.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cupel.evaluation.intervals import wilson
from cupel.images.datasets import Dataset
from cupel.registry import Registry
from cupel.rng import rng
from cupel.robust import aai, attacks, autoattack, isa, unforeseen
from cupel.robust.discrepancy import NORMS, SCOPES, tightness
from cupel.robust.experiment import fraction
from cupel.robust.maps import interpret
from cupel.robust.models import GapClassifier
from cupel.training.adversarial import descend
from cupel.training.augment import to_pixels

#: by the names that experiment.yaml gives under `evaluations`
evaluation = Registry("evaluation", __name__)


@dataclass(frozen=True)
class Subject:
    """A network and the points that it is measured on, both on the device."""

    model: GapClassifier  # in eval mode
    x: Tensor  # float [n, C, H, W] in [0, 1]
    y: Tensor  # int64 [n]
    target: Tensor  # int64 [n], wrong classes for targeted attacks
    draw: Callable[[], np.random.RandomState]  # gives NumPy's legacy generator as it is after the draws of the points
    num_classes: int
    train_eps: float  # ε of the training, or that which the recipe names for methods without one
    seed: int  # of our own random draws
    batch_size: int  # points at a time

    @classmethod
    def make(cls, model: GapClassifier, test: Dataset, *, train_eps: float, seed: int = 0, count: int = 200,
             points_seed: int = 99, batch_size: int = 200, device: str = "cpu") -> "Subject":
        """The points that the released code takes (`attacks.points`) out of a test set.

        Raises:
            ValueError: fewer test images than `count`.
        """
        found = attacks.points(test.labels, len(test.classes), count=count, seed=points_seed)
        images = torch.from_numpy(np.array(test.images[found.index])).to(device)
        model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        return cls(model, to_pixels(images), torch.from_numpy(test.labels[found.index]).to(device),
                   torch.from_numpy(found.target).to(device), lambda: copy.deepcopy(found.draw), len(test.classes),
                   train_eps, seed, batch_size)

    def batches(self, size: int | None = None, count: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x, y and target of the first `count` points (all), `size` (`batch_size`) at a time."""
        return zip(*(values[:count].split(size or self.batch_size) for values in (self.x, self.y, self.target)), strict=True)

    def correct(self, x: Tensor) -> np.ndarray:
        """Where the network is right at points x, bool [n]."""
        with torch.no_grad():
            predicted = torch.cat([self.model(part).argmax(1) for part in x.split(self.batch_size)])
        return (predicted == self.y).cpu().numpy()


@dataclass
class Found:
    """What an evaluation gives: rows for the tidy table, arrays for pictures."""

    rows: list[dict] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def rate(self, metric: str, hits: np.ndarray, attack: str, variant: str = "") -> None:
        """Add the share of true entries, with its Wilson interval."""
        count, n = int(hits.sum()), int(hits.size)
        low, high = wilson(count, n)
        self.number(metric, count / max(n, 1), attack, variant, n=n, low=low, high=high)

    def number(self, metric: str, value: float, attack: str, variant: str = "", **interval: float) -> None:
        """Add a number; left out where it is not finite (nothing was left to average)."""
        if np.isfinite(value):
            self.rows.append({"attack": attack, "attack_variant": variant, "metric": metric, "value": float(value), **interval})


@evaluation("pgd")
def pgd(subject: Subject, *, eps: Sequence, steps: Sequence[int] = attacks.STEPS, step_size: float | str = 0.01) -> Found:
    """Accuracy under PGD against ε and the number of steps: ATA (proper_interpretability SPEC 3.1; E1, E2).

    One run per ε holds all numbers of steps. `ata_train` is the value at the training's ε after all steps, `ata_beyond` the
    mean of those at larger ε; at ε = 0 it is the clean accuracy.
    """
    found, correct = Found(), np.zeros((len(eps), len(steps), len(subject.y)), bool)
    for k, text in enumerate(eps):
        value = fraction(text)
        if value == 0:
            correct[k] = subject.correct(subject.x)
            found.rate("ata", correct[k, -1], "pgd", "eps=0")
            continue
        parts = [attacks.snapshots(subject.model, x, y, eps=value, steps=steps, step_size=fraction(step_size))
                 for x, y, _ in subject.batches()]
        for j, count in enumerate(steps):
            correct[k, j] = subject.correct(torch.cat([part[count] for part in parts]))
            found.rate("ata", correct[k, j], "pgd", f"eps={text} steps={count}")
    values = np.array([fraction(text) for text in eps])
    at, beyond = np.isclose(values, subject.train_eps), values > subject.train_eps * (1 + 1e-6)
    if at.any():
        found.rate("ata_train", correct[at.argmax(), -1], "pgd")
    if beyond.any():
        value, n = float(correct[beyond, -1].mean()), len(subject.y)
        low, high = wilson(round(value * n), n)
        found.number("ata_beyond", value, "pgd", n=n, low=low, high=high)
    return found


@evaluation("restarts")
def restarts(subject: Subject, *, eps: Sequence, steps: int = 200, step_size: float | str = 0.01, restarts: int = 10) -> Found:
    """Our addition: PGD from several random points of the ball, the worst of which counts."""
    found = Found()
    for text in eps:
        value, stream = fraction(text), rng(subject.seed, "restarts", str(text))
        worst = [attacks.restarted(subject.model, x, y, eps=value, steps=steps, step_size=fraction(step_size),
                                   restarts=restarts, rng=stream) for x, y, _ in subject.batches()]
        found.rate("ata", subject.correct(torch.cat(worst)), "pgd_restarts", f"eps={text} steps={steps} restarts={restarts}")
    return found


@evaluation("autoattack")
def auto(subject: Subject, *, eps: Sequence, attacks: Sequence[str] = autoattack.ATTACKS, iterations: int = 100,
         restarts: int = 1, queries: int = 1000) -> Found:
    """Our addition: accuracy after each of ART's attacks in turn (:mod:`cupel.robust.autoattack`)."""
    found = Found()
    for text in eps:
        worst = autoattack.attack(subject.model, subject.x, subject.y, eps=fraction(text), seed=subject.seed,
                                  attacks=attacks, iterations=iterations, restarts=restarts, queries=queries,
                                  batch_size=subject.batch_size)
        for name, x in worst.items():
            found.rate("ata", subject.correct(x), "autoattack", f"eps={text} to={name}")
    return found


@evaluation("aai")
def topk(subject: Subject, *, eps: Sequence, k: int = 8, steps: int = 200, step_size: float | str = 0.01,
         kind: str = "cam") -> Found:
    """Attack against interpretability: Kendall's tau of the maps of the true class, over the images that kept their
    prediction, and the share of those (proper_interpretability SPEC 3.2; E4)."""
    found, taus = Found(), []
    for text in eps:
        value, kept = fraction(text), []
        noise = aai.noise(subject.draw(), subject.x, value)
        taus.append([])
        for (x, y, _), shift in zip(subject.batches(), noise.split(subject.batch_size), strict=True):
            changed = aai.top_k(subject.model, x, y, x + shift, eps=value, k=k, steps=steps, step_size=fraction(step_size),
                                kind=kind)
            tau, stayed = aai.agreement(subject.model, x, changed, y, kind)
            taus[-1] += np.where(stayed, tau, np.nan).tolist()
            kept += stayed.tolist()
        variant = f"eps={text}" + ("" if kind == "cam" else f" map={kind}")
        if any(kept):
            found.number("tau", np.nanmean(taus[-1]), "aai", variant)
        found.rate("kept", np.array(kept), "aai", variant)
    found.arrays["tau"] = np.array(taus)
    return found


@evaluation("bound")
def bound(subject: Subject, *, count: int = 100) -> Found:
    """Two-class l1 CAM discrepancy beside its lower bound, under the targeted attack of least ε
    (proper_interpretability SPEC 2.4, 3.3; E10).

    Rows: the median ratio, its violations (there can be none but by rounding), the median least ε. Images that are taken for
    another class from the start, or never for the target, are left out.
    """
    model, x, true, target = subject.model, subject.x[:count], subject.y[:count], subject.target[:count]
    parts = [isa.least_epsilon(model, images, wanted, population=len(x)) for images, _, wanted in subject.batches(count=count)]
    changed, eps = (torch.cat(values) for values in zip(*parts, strict=True))
    with torch.no_grad():
        usable = (model(x).argmax(1) == true) & (model(changed).argmax(1) == target)
        apart, least = tightness(model, x, changed, true, target)
    used = usable.cpu().numpy()
    apart, least, eps = (value.double().cpu().numpy() for value in (apart, least, eps))
    found = Found(arrays={"apart": apart, "bound": least, "eps": eps, "used": used})
    if used.any():
        found.number("bound_ratio", np.median(apart[used] / least[used]), "least_eps")
        found.rate("bound_violated", apart[used] < least[used] * (1 - 1e-4), "least_eps")
        found.number("least_eps", np.median(eps[used]), "least_eps")
    return found


@evaluation("isa")
def sneaking(subject: Subject, *, multipliers: Sequence[float], kinds: Sequence[str] = ("cam",),
             norms: Sequence[str] = NORMS, scopes: Sequence[str] = SCOPES) -> Found:
    """Interpretability sneaking attack: mean normalised discrepancy and its normalised slope
    (proper_interpretability SPEC 3.4; E5, E6), for every kind, norm and scope; `repr` has no classes, hence one scope.

    Which multipliers p the paper took is not known.
    """
    found = Found()
    for kind, norm, scope in itertools.product(kinds, norms, scopes):
        if kind == "repr" and scope != scopes[0]:
            continue
        parts = [vars(isa.curves(subject.model, x, y, target, multipliers=multipliers, scope=scope, norm=norm, kind=kind,
                                 population=len(subject.y))) for x, y, target in subject.batches()]
        curves = isa.Curves(**{name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]})
        variant = f"{kind} {norm}" + ("" if kind == "repr" else f" {scope}")
        for metric, value in curves.summary().items():
            found.number(metric, value, "isa", variant)
        found.rate("isa_kept", curves.kept.all(0), "isa", variant)
        found.arrays |= {f"{kind}_{norm}_{scope}_{name}": value for name, value in vars(curves).items()}
    return found


@evaluation("unforeseen")
def unseen(subject: Subject, *, attacks: Sequence[str] = tuple(unforeseen.ATTACKS), eps: dict | None = None,
           iterations: int = unforeseen.ITERATIONS) -> Found:
    """Accuracy under attacks that no training has seen (proper_interpretability SPEC 3.5; E3), 40 images at a time as released.

    `eps`, by attack, stands in for the usual ones.
    """
    found = Found()
    for name in attacks:
        stream = rng(subject.seed, "unforeseen", name)
        changed = [unforeseen.attack(name, subject.model, x, target, rng=stream, eps=(eps or {}).get(name),
                                     iterations=iterations) for x, _, target in subject.batches(40)]
        found.rate("ata", subject.correct(torch.cat(changed)), name)
    return found


@evaluation("gallery")
def gallery(subject: Subject, *, eps: float | str, count: int = 5, steps: int = 200, step_size: float | str = 0.01,
            multiplier: float = 1.5) -> Found:
    """Images and maps before and under attack (E7), and the clean maps of all points (E11).

    Shown are the first `count` points: as they are, under PGD of ε, and under the 2-class l1 sneaking attack with `multiplier`
    times their least ε; maps of the true class and of the target.

    Returns:
        Arrays `images` float32 [3, m, C, H, W], `maps` [3, m, 2, h, w], `predicted` [3, m], `classes` [m, 2], and `cams`
        [n, h, w] of all points.
    """
    model, x, true, target = subject.model, subject.x[:count], subject.y[:count], subject.target[:count]
    classes = torch.stack([true, target], 1)
    attacked = attacks.snapshots(model, x, true, eps=fraction(eps), steps=(steps,), step_size=fraction(step_size))[steps]
    sneaked, _ = isa.sneak(model, x, true, target, multiplier * isa.least_epsilon(model, x, target)[1])
    images = (x, attacked, sneaked)
    with torch.no_grad():
        maps = [interpret(model, z, classes) for z in images]
        predicted = [model(z).argmax(1) for z in images]
        cams = torch.cat([interpret(model, z, y[:, None])[:, 0] for z, y, _ in subject.batches()])
    arrays = {"images": torch.stack(images).float(), "maps": torch.stack(maps).float(), "predicted": torch.stack(predicted),
              "classes": classes, "cams": cams.float()}
    return Found(arrays={name: value.cpu().numpy() for name, value in arrays.items()})


@evaluation("features")
def features(subject: Subject, *, count: int = 6, steps: int = 100, step_size: float = 0.5) -> Found:
    """What the network looks at (proper_interpretability SPEC 8, E12): its first filters, and inputs that maximise neurons.

    The paper's repository has no code for the latter; the procedure is ours, without a ball around the test image it starts at:

        x ← clip( x + η ∇ h_d(x) / ‖∇ h_d(x)‖₂ ),    h_d(x) = mean_ij A_dij(x),    η = `step_size`

    Where features mean something to people, so do the images; else they are patterns of noise. d is, for each of the first
    `count` classes, the neuron of the penultimate layer that speaks most for it.

    Returns:
        Arrays `filters` [d, C, k, k], `start` and `reached` [count, C, H, W], `neurons` [count].
    """
    model, count = subject.model, min(count, subject.num_classes)
    neurons, start = model.head.weight[:count].argmax(1), subject.x[:count]

    def step(x: Tensor, gradient: Tensor, _: int) -> Tensor:
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        return (x - step_size * gradient / length).clamp(0, 1)

    reached = descend(start, lambda x: -model.features(model.hidden(x)).gather(1, neurons[:, None]).sum(), step, steps=steps)
    filters = next(model.parameters()).detach()  # those of the first convolution
    arrays = {"filters": filters, "start": start, "reached": reached, "neurons": neurons}
    return Found(arrays={name: value.cpu().numpy() for name, value in arrays.items()})
