"""What a scale will take before anything is run: jobs, hours, disk and downloads, from records of earlier runs.

    make plan SCALE=paper                          or: python -m cupel.plan --scale paper [--papers fst ims]
    python -m cupel.plan --scale paper --calibrate     measures this machine on the networks of that grid first

A number is *measured* where a record holds the very cell (but for seed and poison rate) on the hardware planned for,
and *modelled* otherwise. The model of an image cell, in seconds:

    training a victim    = images * unit * factor(attack)          images = epochs * training images
    a defence            = images * unit * factor(defence) + 2 * test images * unit / 3
                           images = passes (`PASSES`, from its hyperparameters) * clean images

where `unit` is what one training image (forward and backward) costs this network on this hardware, from a record of
it, else from the record of the network nearest in FLOP, in proportion to FLOP; `factor` is what a method costs
beside plain training, from its own record at any scale, else the median of all methods; a forward pass is a third of a
training step. To every job comes the time to start it. For cells of other families, on language and multimodal models and on
interpretation, there is a formula each in `plan_families`.

Records are the benchmark and metrics files under `results/` and the committed docs/results/costs.csv. What was measured on a
processor says nothing of a GPU: without a record from a GPU all times are those of a processor. Nothing here asks Snakemake: a
grid of 20,000 cells is planned in seconds.
"""

import argparse
import ast
import csv
import functools
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from cupel import plan_families
from cupel.files import read_json, write_text
from cupel.grid import LIBRARY, SCHEMAS, Grid, check_schema, read_yaml, typed
from cupel.images import datasets
from cupel.sources import default_cache

COSTS = LIBRARY.parents[1] / "docs" / "results" / "costs.csv"
#: rule that makes the cells of a stage of the image family, and the name of its benchmark file
STAGES = {"victim": ("train_victim", "victim"), "purified": ("purify", "purify")}
#: jobs that Snakemake gives a GPU, where there is one, beside the cells
GPU_RULES = ("prepare_trigger", "ims_inside")

#: passes over the clean images of a defence, by its hyperparameters h, with n clean images and k classes
PASSES: dict[str, Callable] = {
    "anp": lambda h, n, k: h.iterations * min(h.batch_size, n) * (h.steps + 1) / n,
    "awn": lambda h, n, k: 2 * h.epochs,
    "bnp": lambda h, n, k: 1,
    "bti_dbf": lambda h, n, k: h.pretrain_epochs + h.rounds * (h.mask_epochs + h.generator_epochs + h.unlearn_epochs),
    "clp": lambda h, n, k: 0,
    "i_bau": lambda h, n, k: h.rounds * (h.iterations + 1),
    "ims": lambda h, n, k: (h.rounds_initial + 2 * h.rounds_minimise) * min(h.batch_size, n) * (2 * h.steps_perturb + 4) / n,
    "nad": lambda h, n, k: h.teacher_epochs + h.epochs,
    "nc": lambda h, n, k: k * h.search_epochs + h.epochs,
    "npd": lambda h, n, k: h.warm_epochs + h.epochs * (h.steps + 1),
    "pbe": lambda h, n, k: h.rounds * (h.steps + 1),
    "rnp": lambda h, n, k: h.unlearn_epochs + h.recovery_epochs,
    "sau": lambda h, n, k: h.rounds * (h.steps + 1),
}
PASSES["ims_vit"] = PASSES["ims"]
PASSES |= {name: lambda h, n, k: h.epochs for name in (
    "fe_tuning", "fmp", "fp", "fst", "ft", "ft_init", "ft_long", "ft_sam", "lp", "mm_bd", "nft", "sam_ft")}


@dataclass(frozen=True)
class Record:
    """What one kind of job cost.

    Attributes:
        rule: that made it; `startup`: imports of a job; `step`: plain training steps; `download`: a raw file, by name;
            the name of a family: all jobs of its papers together.
        scale, dataset, model, recipe, method, budget: of the cell; `method` is its attack or defence. Empty: any.
        jobs: how many were measured.
        seconds: median of one, without the start of the job for cells on images, with it for all others.
        images: training images of one, forward and backward; of families other than images its teraFLOP
            (`plan_families`); 0 where the time does not depend on them.
        network: `cost_key` of the network that was trained.
        megabytes: of a download.
        hardware: processor or GPU.
        source: where the number stands.
    """

    rule: str
    scale: str = ""
    dataset: str = ""
    model: str = ""
    recipe: str = ""
    method: str = ""
    budget: str = ""
    jobs: int = 1
    seconds: float = 0.0
    images: float = 0.0
    network: str = ""
    megabytes: float = 0.0
    hardware: str = ""
    source: str = ""

    @property
    def cell(self) -> tuple:
        return self.rule, self.scale, self.dataset, self.model, self.recipe, self.method, self.budget


def read_records(path: str | Path) -> list[Record]:
    """Records of a CSV file; none where there is no file.

    Raises:
        ValueError: a column is missing or is no number.
    """
    if not Path(path).is_file():
        return []
    kinds = {f.name: f.type for f in fields(Record)}
    with open(path, newline="", encoding="utf-8") as file:
        try:
            return [Record(**{name: kind(row[name] or 0) if kind is not str else row[name] for name, kind in kinds.items()})
                    for row in csv.DictReader(file)]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a table of costs: {error!r}") from None


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Records as CSV, sorted, numbers rounded to four figures."""
    def short(value):
        return f"{value:.4g}" if isinstance(value, float) else value

    lines = [[short(value) for value in asdict(record).values()] for record in records]
    text = [",".join(f.name for f in fields(Record))]
    for line in sorted(map(list, lines), key=str):
        text.append(",".join(f'"{cell}"' if "," in str(cell) else str(cell) for cell in line))
    write_text(path, "\n".join(text) + "\n")


# --- what a cell is made of


@functools.cache
def _built(model: str, shape: tuple, classes: int, options: tuple) -> tuple[float, float]:
    """FLOP of a forward pass of one image, and megabytes of the weights: from shapes alone, nothing is computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cupel.images import models

    height, _, channels = shape
    with torch.device("meta"):
        network = models.build(model, num_classes=classes, image_size=height, in_channels=channels, **dict(options)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, channels, height, height))
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    return float(counter.get_total_flops()), size / 1e6


@dataclass(frozen=True)
class Cell:
    """A victim or purified model of the image chain, with what its cost depends on.

    Attributes:
        images: training images, forward and backward.
        tested: test images.
        network: data set, architecture and precision in one word: equal words cost the same per image.
        flop: of one image forward.
        megabytes: of the files that stay.
    """

    images: float
    tested: int
    network: str
    flop: float
    megabytes: float


def _defaults(path: Path, name: str) -> dict:
    """Default values of a defence's keyword arguments, read from its file; what is no plain value is left out."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and any(
                isinstance(d, ast.Call) and getattr(d.func, "id", "") == "defence" and d.args[0].value == name
                for d in node.decorator_list):
            found = {}
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                try:
                    found[argument.arg] = ast.literal_eval(default)
                except (ValueError, TypeError):
                    continue
            return found
    return {}


class Work:
    """The work in the cells of a grid: looked up once for cells that differ in seed, rate or attack only."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self._settings = functools.cache(grid.recipe)
        self._cell = functools.cache(self._make)

    def of(self, cell: dict) -> Cell:
        """Work of a cell of `Grid.cells`."""
        attack = cell["attack"] if cell["stage"] == "victim" else ""
        return self._cell(cell["stage"], cell["dataset"], cell["model"], cell["recipe"], attack,
                          cell.get("defence", ""), cell.get("budget", ""))

    def _make(self, stage, dataset, model, recipe, attack, defence, budget) -> Cell:
        about, settings = datasets.describe(dataset), self._settings(recipe, dataset)
        training = dict(settings["training"])
        if attack and attack != "clean":
            training |= self.grid.attack_training(attack)
        options = {key: value for key, value in settings.get("model", {}).items() if key != "pretrained"}
        flop, size = _built(model, about.shape, len(about.classes), tuple(sorted(options.items())))
        held = settings.get("held_out", 0.0) * about.sizes[0]
        trained = min(settings.get("train_size") or math.inf,
                      about.sizes[0] - (held if settings.get("remove_held_out", True) else 0))
        tested = min(settings.get("test_size") or math.inf, about.sizes[1])
        words = [f"{model}/{dataset}", *(f"{key}={value}" for key, value in sorted(options.items())),
                 training.get("precision", "fp32"), *(["compile"] if training.get("compile") else [])]
        network = " ".join(words)
        if stage == "victim":
            stamped = trained * 0.01 * math.prod(about.shape) / 1e6  # poisoned images, at a rate of 1 %
            return Cell(training["epochs"] * trained, int(tested), network, flop, size + stamped)
        clean = self.grid.budget(budget)
        # `held_out` gives a part of the training set, `spc` so many samples per class
        n = max(held if clean["kind"] == "held_out" else clean["spc"] * len(about.classes), 1)
        entry = self.grid.defence(defence, dataset)
        file = self.grid.code("defence", entry["function"])
        h = {**_defaults(file, entry["function"]), **entry["hyperparameters"]}
        passes = PASSES.get(entry["function"], lambda h, n, k: getattr(h, "epochs", 1))
        return Cell(passes(SimpleNamespace(**h), n, len(about.classes)) * n, int(tested), network, flop, size)


# --- records of runs


def hardware(device: str = "cpu") -> str:
    """Name of this machine's GPU or processor, as in provenance.json."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    from cupel.reporting.provenance import processor

    return processor()


def cells_of(grid: Grid, seeds: Iterable[int] | None = None) -> list[dict]:
    """Cells of all papers of a grid; those of other families say by which rule they are made (`plan_families.cells_of`)."""
    return grid.cells() + plan_families.cells_of(grid, seeds)


def key_of(grid: Grid, cell: dict) -> tuple:
    """What a cell's cost depends on, as `Record.cell`: neither seed nor poison rate, nor the attack for a defence."""
    rule = cell.get("rule") or STAGES[cell["stage"]][0]
    method = cell.get("defence") or cell.get("attack", "")
    return rule, grid.scale, cell["dataset"], cell["model"], cell["recipe"], method, cell.get("budget", "")


def folder_of(cell: dict) -> str:
    """An image cell's folder below `results/<scale>`."""
    stem = "{dataset}/{model}/{recipe}/{attack}@{rate}/seed{seed}".format(**cell)
    return f"victims/{stem}" if cell["stage"] == "victim" else f"purified/{stem}/{cell['defence']}@{cell['budget']}"


def collect(results: str | Path, grid: Grid, cells: Iterable[dict]) -> list[Record]:
    """Records of the cells of a grid that are there, and of the other rules, from a results folder.

    Seconds of a cell on images are those of its metrics.json (the work, without the start of the job); of another job those
    of its benchmark file. The hardware is that of provenance.json; without one, this machine.
    """
    results, scale, work = Path(results), grid.scale, Work(grid)
    times, found = results / "benchmark" / scale, {}
    made = results / scale / "provenance.json"
    about = read_json(made) if made.is_file() else {}
    names = {"cuda": about.get("versions", {}).get("gpu"), "cpu": about.get("processor")}
    for cell in cells:
        family = "rule" in cell
        folder = cell["folder"] if family else folder_of(cell)
        file = results / scale / folder / cell.get("record", "metrics.json")
        if not file.is_file():
            continue
        record = read_json(file)
        if record.get("status", "ok") != "ok" or "failed" in record or record.get("reused"):
            continue
        device = record.get("device") or ("cuda" if names["cuda"] else "cpu")
        names[device] = names[device] or hardware(device)
        seconds = record["seconds"]
        if family:
            whole = times / folder / f"{plan_families.RULES[cell['rule']][1]}.tsv"
            seconds = next(iter(_seconds(whole)), seconds) if whole.is_file() else seconds
        found.setdefault((key_of(grid, cell), names[device]), (cell, []))[1].append(seconds)
    records = []
    for (key, name), (cell, rows) in found.items():
        if "rule" in cell:
            amount, network = plan_families.work_of(cell)[0] or 0.0, ""
        else:
            amount, network = work.of(cell).images, work.of(cell).network
        records.append(Record(*key, jobs=len(rows), seconds=statistics.median(rows), images=amount, network=network,
                              hardware=name, source=f"{results}/{scale}/**/metrics.json"))
    cell_files = {name for _, name in [*STAGES.values(), *plan_families.RULES.values()]}
    short = {"trigger": "prepare_trigger", "inside": "ims_inside", "report": "zoo_report"}
    jobs: dict[str, list[float]] = {}
    for file in sorted(times.rglob("*.tsv")):
        if file.stem not in cell_files:
            rule = plan_families.BENCHMARKS.get((file.relative_to(times).parts[0], file.stem), short.get(file.stem, file.stem))
            jobs.setdefault("contact_sheet" if rule.startswith("triggers_") else rule, []).extend(_seconds(file))
    if jobs:
        names["cpu"] = names["cpu"] or hardware()
    return records + [Record(rule, scale, jobs=len(s), seconds=statistics.median(s), hardware=names["cpu"],
                             source=f"{results}/benchmark/{scale}") for rule, s in jobs.items() if s]


def _seconds(file: Path) -> list[float]:
    """Of a benchmark file of Snakemake."""
    with open(file, newline="") as table:
        return [float(row["s"]) for row in csv.DictReader(table, delimiter="\t")]


def calibrate(grid: Grid, cells: Iterable[dict], device: str, seconds: float = 2.0) -> list[Record]:
    """Measure plain training of every network of the cells on this machine.

    Random images, the recipe's batch size and precision, through the training engine; two warm-up rounds (of which one
    compiles, where the recipe compiles), then rounds for at least `seconds`.
    """
    import numpy as np

    from cupel.images import models
    from cupel.training.engine import Recipe, fit
    from cupel.training.precision import settled

    work, records, name = Work(grid), {}, hardware(device)
    for cell in (cell for cell in cells if cell["stage"] == "victim" and "rule" not in cell):
        network = work.of(cell).network
        if network in records:
            continue
        about, settings = datasets.describe(cell["dataset"]), grid.recipe(cell["recipe"], cell["dataset"])
        training = settled(settings["training"], device)
        options = {key: value for key, value in settings.get("model", {}).items() if key != "pretrained"}
        size, classes = training.get("batch_size", 128), len(about.classes)
        count = size * (4 if device == "cuda" else 1)
        images = np.random.default_rng(0).integers(0, 256, (count, *about.shape), np.uint8)
        labels = np.arange(count) % classes
        model = models.build(cell["model"], num_classes=classes, image_size=about.shape[0], in_channels=about.shape[2],
                             seed=0, **options)
        recipe = Recipe(epochs=1, lr=1e-3, batch_size=size, crop=training.get("crop", 4), flip=about.flip,
                        precision=training.get("precision", "fp32"), compile=training.get("compile", False))
        trained, began = 0, 0.0
        for number in range(10_000):
            if number == 2:
                trained, began = 0, time.perf_counter()
            fit(model, images, labels, recipe, seed=number, device=device)
            trained += count
            if number >= 2 and time.perf_counter() - began >= seconds:
                break
        taken = time.perf_counter() - began
        print(f"{network}: {trained / taken:,.0f} images/s on {name}", file=sys.stderr, flush=True)
        records[network] = Record("step", grid.scale, cell["dataset"], cell["model"], cell["recipe"], jobs=1, seconds=taken,
                                  images=trained, network=network, hardware=name, source="calibration")
    return list(records.values())


# --- the plan


@dataclass
class Line:
    """Cells or jobs of one rule.

    Attributes:
        gpu: they ask for one.
        cells: how many; of these, `measured_cells` and `modelled_cells` are costed.
        joined: cells that share the job of another one.
        measured, modelled: seconds of the two kinds of cells.
        starts: seconds in which jobs of cells start.
        megabytes: that stay on disk.
    """

    rule: str
    gpu: bool = False
    cells: int = 0
    joined: int = 0
    measured: float = 0.0
    modelled: float = 0.0
    starts: float = 0.0
    measured_cells: int = 0
    modelled_cells: int = 0
    megabytes: float = 0.0

    @property
    def unknown_cells(self) -> int:
        """Cells with neither record nor model."""
        return self.cells - self.measured_cells - self.modelled_cells

    @property
    def jobs(self) -> int:
        """How many Snakemake runs."""
        return self.cells - self.joined

    @property
    def seconds(self) -> float:
        return self.measured + self.modelled + self.starts

    def add(self, seconds: float | None, measured: bool, megabytes: float = 0.0, count: int = 1) -> None:
        """Count cells of so many seconds each; None: not known."""
        self.cells += count
        self.megabytes += megabytes * count
        if seconds is None:
            return
        if measured:
            self.measured, self.measured_cells = self.measured + seconds * count, self.measured_cells + count
        else:
            self.modelled, self.modelled_cells = self.modelled + seconds * count, self.modelled_cells + count


@dataclass
class Plan:
    """What a scale takes.

    Attributes:
        hardware: that the seconds are for.
        lines: of the rules.
        downloads: raw files, (data set, file name, megabytes or None, already there).
        notes: where numbers come from, with how many cells each; and what is not in the plan.
    """

    scale: str
    papers: list[str]
    hardware: str
    lines: list[Line]
    downloads: list[tuple]
    notes: Counter = field(default_factory=Counter)

    @property
    def gpu_seconds(self) -> float:
        """Of the jobs that ask for a GPU."""
        return sum(line.seconds for line in self.lines if line.gpu)


class Model:
    """Seconds of cells on one hardware, from records of any."""

    def __init__(self, records: Iterable[Record], name: str):
        self.records, self.name = list(records), name
        self.here = [record for record in self.records if record.hardware == name]
        self.exact = {record.cell: record for record in self.here}
        self.starts = self._median(r.seconds for r in self._prefer("startup"))
        plain = {}
        for record in self.records:
            if record.rule in ("train_victim", "step") and record.images and record.seconds:
                unit = record.seconds / record.images
                plain.setdefault((record.hardware, record.network), []).append((record.rule == "step", unit))
        #: seconds of a training image, by hardware and network: measured steps if there are any, else the cheapest
        #: victims, since what an attack adds is its factor
        self.units = {key: min(unit for step, unit in rows if step == any(s for s, _ in rows)) for key, rows in plain.items()}
        self.factors: dict[tuple, list[float]] = {}
        for record in self.records:
            unit = self.units.get((record.hardware, record.network))
            if record.rule in ("train_victim", "purify") and record.images and unit:
                self.factors.setdefault((record.rule, record.method.partition("~")[0]), []).append(
                    record.seconds / (record.images * unit))

    @staticmethod
    def _median(values) -> float | None:
        values = list(values)
        return statistics.median(values) if values else None

    def _prefer(self, rule: str) -> list[Record]:
        """Records of a rule on this hardware; of any, where there are none."""
        return [r for r in self.here if r.rule == rule] or [r for r in self.records if r.rule == rule]

    def rule(self, rule: str) -> tuple[float | None, bool, str]:
        """Seconds of a job that is no cell, whether they were measured on this hardware, and where they stand."""
        found = self._prefer(rule)
        if not found:
            return None, False, f"{rule}: no record"
        return self._median(r.seconds for r in found), found[0].hardware == self.name, f"{rule}: {found[0].source}"

    def unit(self, cell: Cell) -> tuple[float | None, str]:
        """Seconds of one training image of a cell's network, and how they are known."""
        known = {network: unit for (name, network), unit in self.units.items() if name == self.name}
        if cell.network in known:
            return known[cell.network], "its network was measured"
        sizes = {network: flop for network in known if (flop := flop_of(network))}
        if not sizes:
            return None, "no network was measured on this hardware"
        near = min(sizes, key=lambda network: abs(math.log(sizes[network] / cell.flop)))
        return known[near] * cell.flop / sizes[near], f"in proportion to FLOP from {near}"

    def factor(self, rule: str, method: str) -> tuple[float, str]:
        """What a method costs beside plain training, and how it is known."""
        own = self.factors.get((rule, method.partition("~")[0]))
        if own:
            return self._median(own), "its method was measured"
        rest = [value for (other, _), values in self.factors.items() if other == rule for value in values]
        return (self._median(rest), "median of all methods") if rest else (1.0, "as plain training")

    def cell(self, key: tuple, work: Cell) -> tuple[float | None, bool, str]:
        """Seconds of a cell, without the start of its job; whether measured; how they are known."""
        test = 0.0
        unit, how = self.unit(work)
        if key[0] == "purify" and unit is not None:  # the seconds of a purified cell are those of the defence alone
            test = 2 * work.tested * unit / 3
        if key in self.exact:
            return self.exact[key].seconds + test, True, f"measured: {self.exact[key].source}"
        if unit is None:
            return None, False, how
        if not work.images:
            other = [r.seconds for r in self._prefer(key[0]) if r.method == key[5]]
            return (self._median(other) or 0.0) + test, False, "modelled: time without images, " + how
        factor, why = self.factor(key[0], key[5])
        return work.images * unit * factor + test, False, f"modelled: {how}; {why}"

    def family(self, key: tuple, amount: float | None) -> tuple[float | None, bool, str]:
        """As `cell`, for one of the other families with so many teraFLOP: in proportion to them from a record of the family,
        on this hardware or, between processors, on another one; none is taken from a processor for a GPU."""
        rule, family = key[0], plan_families.RULES[key[0]][0]
        if key in self.exact:
            return self.exact[key].seconds, True, f"measured: {self.exact[key].source}"
        if amount is None:
            return None, False, f"{rule}: its work is not known"
        rules = {family, *(name for name, (other, _) in plan_families.RULES.items() if other == family)}
        known = [r for r in self.records if r.rule in rules and r.images and r.seconds]
        known = [r for r in known if r.hardware == self.name] or [r for r in known if on_gpu(r.hardware) == on_gpu(self.name)]
        if not known:
            return None, False, f"{rule}: no cell of the family {family} was measured on such hardware"
        near = min(known, key=lambda r: (r.rule != rule, r.rule == family, abs(math.log(r.images / amount))))
        about = f"{near.rule} at {near.scale}" + f" on {near.hardware}" * (near.hardware != self.name)
        return amount * near.seconds / near.images, False, f"modelled: {rule} in proportion to FLOP from {about}"


def on_gpu(name: str) -> bool:
    """Whether hardware, by its name in the records, is a GPU."""
    return "cores" not in name


@functools.cache
def flop_of(network: str) -> float | None:
    """FLOP of one image forward of a network by its word (`Cell.network`); None for one that cannot be built."""
    name, *words = network.split(" ")
    model, _, dataset = name.partition("/")
    options = tuple((key, int(value)) for key, _, value in (word.partition("=") for word in words) if value.isdigit())
    try:
        about = datasets.describe(dataset)
        return _built(model, about.shape, len(about.classes), options)[0]
    except ValueError:
        return None


def downloads(wanted: Mapping[str, Iterable], kinds: list[str], records: Iterable[Record], cache: Path | None) -> list[tuple]:
    """Raw files of the first source that is configured of each data set or packaged model, with their size where it is known.

    A source of which all files are in the cache comes first, as when the data are prepared.
    """
    sizes = {record.method: record.megabytes for record in records if record.rule == "download"}
    found = []
    for name, known in sorted(wanted.items()):
        sources = [s for kind in kinds for s in known if s.kind == kind]
        there = [s for s in sources if cache and all((cache / raw.name).is_file() for raw in s.files)]
        for raw in (there or sources or [SimpleNamespace(files=())])[0].files:
            cached = bool(cache) and (cache / raw.name).is_file()
            size = (cache / raw.name).stat().st_size / 1e6 if cached else sizes.get(raw.name)
            found.append((name, raw.name, size, cached))
    return found


def make_plan(grid: Grid, records: Iterable[Record], *, name: str = "", kinds: Iterable[str] = ("official", "package"),
              cache: Path | None = None, cells: Iterable[dict] | None = None) -> Plan:
    """Count and cost the jobs of a grid's report.

    Args:
        grid: papers and scale.
        records: see `collect` and `read_records`; where two tell of the same, the later wins.
        name: hardware to plan for; default: the one with the most records.
        kinds: of data sources, in order (config.yaml, data.sources).
        cache: folder of downloaded files.
        cells: instead of `cells_of(grid)`.

    Raises:
        ValueError: no record is of that hardware.
    """
    records = list(records)
    cells = cells_of(grid) if cells is None else list(cells)
    known = Counter(r.hardware for r in records if r.rule not in ("startup", "download"))
    if name and name not in known:
        raise ValueError(f"no record is of {name!r}; there are records of {'; '.join(sorted(known)) or 'nothing'}")
    name = name or (known.most_common(1)[0][0] if known else "")
    model, work, lines = Model(records, name), Work(grid), {}
    notes = Counter()

    def line(rule: str, gpu: bool) -> Line:
        return lines.setdefault(rule, Line(rule, gpu))

    counts, examples, seen = Counter(), {}, set()
    for cell in cells:
        key = key_of(grid, cell)
        counts[key] += 1
        examples.setdefault(key, cell)
        if key[0] == "train_victim":
            seen.add((cell["dataset"], cell["model"], cell["recipe"], cell["attack"], cell["rate"], cell["seed"]))
    triggers = _triggers(grid, seen)
    for twin in triggers["twins"] - seen:
        cell = dict(zip(("dataset", "model", "recipe", "attack", "rate", "seed"), twin, strict=True)) | {"stage": "victim"}
        key = key_of(grid, cell)
        counts[key] += 1
        examples.setdefault(key, cell)
    for key, count in counts.items():
        if "rule" in examples[key]:
            amount, megabytes = plan_families.work_of(examples[key])
            seconds, measured, how = model.family(key, amount)
        else:
            costs = work.of(examples[key])
            megabytes, (seconds, measured, how) = costs.megabytes, model.cell(key, costs)
        line(key[0], True).add(seconds, measured, megabytes, count)
        notes[how] += count
    if "purify" in lines:  # where one job does all defences of a victim
        lines["purify"].joined = sum(len(block) - 1 for block in grid.blocks().values())
    for one in lines.values():
        if one.rule not in plan_families.RULES:  # their records are of whole jobs
            one.starts = one.jobs * (model.starts or 0.0)
    family_cells = [cell for cell in cells if "rule" in cell]
    names = {cell["dataset"] for cell in cells if "rule" not in cell}
    arrays = sorted(names | {cell["dataset"] for cell in cells if cell.get("rule") == "train_robust"})
    victims = sum(count for key, count in counts.items() if key[0] == "train_victim")
    others = {"poison": victims, "prepare_trigger": len(triggers["jobs"]), "prepare_dataset": len(arrays),
              "contact_sheet": len(names), "gather_cells": 1, "cross": int(bool(grid.papers_of("image"))), "index": 1}
    others |= dict.fromkeys(("report_paper", "feature_maps"), len(grid.papers_of("image")))
    others |= {rule: len(grid.papers_of(family)) for family, rule in plan_families.REPORTS.items()}
    others |= {"notebook": len(grid.papers), "ims_inside": int("ims" in grid.papers)}
    others = {rule: (count, 0.0) for rule, count in others.items()} | plan_families.others(family_cells)
    for rule, (count, megabytes) in others.items():
        if count:
            seconds, measured, how = model.rule(rule)
            line(rule, rule in GPU_RULES).add(seconds, measured, megabytes / count, count)
            notes[how] += count
    for dataset in arrays:
        about = datasets.describe(dataset)
        if None not in about.sizes:
            lines["prepare_dataset"].megabytes += sum(about.sizes) * (math.prod(about.shape) + 8) / 1e6
    wanted, hub = plan_families.sources_of(family_cells)
    wanted |= {dataset: datasets.describe(dataset).sources for dataset in arrays}
    found = downloads(wanted, list(kinds), records, cache) + hub
    order = ["prepare_dataset", "prepare_trigger", "poison", "train_victim", "purify",
             "prepare_text", "prepare_language_model", "compose_texts", "train_language_victim", "purify_language",
             "prepare_multimodal", "build_model", "poison_samples", "trigger_samples", "train_multimodal", "read_attention",
             "measure_filters", "refit", "purify_pictures", "train_robust", "attack_network"]
    rank = {rule: place for place, rule in enumerate(order)}
    return Plan(grid.scale, grid.papers, name, sorted(lines.values(), key=lambda one: rank.get(one.rule, 99)), found, notes)


def _triggers(grid: Grid, victims: set[tuple]) -> dict[str, set]:
    """Preparations of triggers, and the clean twins that some of them need."""
    jobs, twins = set(), set()
    for dataset, model, recipe, attack, _, seed in victims:
        if attack == "clean" or attack not in grid.entries["attacks"]:
            continue
        needs = _needs(grid.code("attack", grid.attack(attack, dataset)["function"]))
        if needs:
            jobs.add((dataset, model, recipe, attack, seed))
        if needs == "clean_model":
            twins.add((dataset, model, recipe, "clean", "0", seed))
    return {"jobs": jobs, "twins": twins}


@functools.cache
def _needs(file: Path | None) -> str:
    """What an attack must be given beforehand, as its file says."""
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))) if file else ():
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "needs" and node.value:
            return node.value.value
    return ""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def _size(megabytes: float) -> str:
    return f"{megabytes:,.0f} MB" if megabytes < 10_000 else f"{megabytes / 1000:,.0f} GB"


def show(plan: Plan) -> str:
    """The plan for people."""
    gpu = on_gpu(plan.hardware)
    rows = [("rule", "jobs", "cells", "time", "measured", "modelled", "not known", "disk")]
    total = Line("total")
    for line in plan.lines:
        for key in ("cells", "joined", "starts", "measured", "modelled", "measured_cells", "modelled_cells", "megabytes"):
            setattr(total, key, getattr(total, key) + getattr(line, key))
    for line in [*plan.lines, total]:
        taken = "not known" if line.unknown_cells == line.cells else _duration(line.seconds)
        rows.append((line.rule + (" *" if line.gpu else ""), f"{line.jobs:,}", f"{line.cells:,}", taken,
                     f"{line.measured_cells:,}", f"{line.modelled_cells:,}", f"{line.unknown_cells:,}", _size(line.megabytes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [f"Scale {plan.scale}, papers {', '.join(plan.papers)}; times are on: {plan.hardware or 'nothing measured'}", ""]
    text += ["  ".join(cell.ljust(width) if k == 0 else cell.rjust(width) for k, (cell, width) in
                       enumerate(zip(row, widths, strict=True))) for row in rows]
    work = total.measured + total.modelled
    share = total.measured / work if work else 0.0
    unit = "GPU-hours" if gpu else "hours on one core of that processor"
    text += ["", f"{share:.0%} of the time is of measured cells, {1 - share:.0%} modelled; {total.unknown_cells:,} are in "
             f"neither. To start jobs takes {_duration(total.starts)} of the whole.",
             f"* asks for a GPU: {plan.gpu_seconds / 3600:,.1f} {unit}."]
    if not gpu:
        text.append("  No record is from a GPU. On the machine that shall run this: make plan SCALE=... CALIBRATE=1")
    text += ["", "Downloads"]
    for dataset, files in groupby(plan.downloads, lambda row: row[0]):
        files = list(files)
        if len(files) > 4:
            known = [size for _, _, size, _ in files]
            files = [(dataset, f"{len(files)} files", None if None in known else sum(known), all(row[3] for row in files))]
        text += [f"  {dataset}: {name}, {'size not known' if size is None else _size(size)}" + ", already here" * there
                 for _, name, size, there in files]
    text += ["", "Where times come from (cells or jobs)"]
    text += [f"  {count:>7,}  {how}" for how, count in plan.notes.most_common()]
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m cupel.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--scale", help="instead of that of config.yaml")
    parser.add_argument("--papers", nargs="+", help="instead of those of config.yaml")
    parser.add_argument("--hardware", default="", help="to plan for, by its name in the records")
    parser.add_argument("--calibrate", action="store_true", help="first measure the networks of the grid on this machine")
    parser.add_argument("--write", metavar="FILE", help="add the records of results/ to a table, as docs/results/costs.csv")
    options = parser.parse_args(arguments)
    schema = read_yaml(SCHEMAS / "config.schema.yaml")
    config = typed(read_yaml(options.config), schema)
    check_schema(config, "config", options.config)
    scale, results, data = options.scale or config["scale"], config.get("results", "results"), config.get("data", {})
    seeds = config.get("seeds")
    grid = Grid(options.papers or config["papers"], scale, seeds, config.get("plugins", []), config.get("jobs"))
    calibration = Path(results) / "calibration.csv"
    if options.calibrate:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        measured = calibrate(grid, cells_of(grid, seeds), device)
        again = {(record.hardware, record.network) for record in measured}
        before = [record for record in read_records(calibration) if (record.hardware, record.network) not in again]
        write_records(calibration, [*before, *measured])
        options.hardware = options.hardware or hardware(device)
    own = []
    for name in ("smoke", "demo", "bench", "paper"):
        if (Path(results) / name).is_dir():
            at = Grid(grid.papers, name, seeds, config.get("plugins", []))
            own += collect(results, at, cells_of(at, seeds))
    records = [*read_records(COSTS), *read_records(calibration), *own]
    if options.write:
        kept = {(r.cell, r.hardware): r for r in [*read_records(options.write), *read_records(calibration), *own]}
        write_records(options.write, [replace(r, source=r.source.replace(str(Path.cwd()), ".")) for r in kept.values()])
    kinds = data.get("sources") or schema["properties"]["data"]["properties"]["sources"]["default"]
    print(show(make_plan(grid, records, name=options.hardware, kinds=kinds,
                         cache=Path(data.get("cache") or default_cache()).expanduser(), cells=cells_of(grid, seeds))))


if __name__ == "__main__":
    main()
