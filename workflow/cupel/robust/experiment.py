"""What the papers on robust training ask for: which networks are trained, and what each is measured with.

A cell of stage `trained` is a network: data set, model, recipe, defence (the objective it is trained with), seed. One of stage
`attacked` is one evaluation of a network. `name~variant` is a switch where paper and code differ, or an ablation.
"""

import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction

from cupel import limits
from cupel.experiment import Family, layers, overlaid
from cupel.images.datasets import describe
from cupel.paths import Paths
from cupel.settings import ConfigError, check_schema

POINTS = {"count", "seed", "batch_size"}
WITHOUT_PENALTY = ("normal", "adv")
COLOUR = ("cifar10", "restricted_imagenet")


def fraction(value: float | str) -> float:
    """A number of a settings file: 0.3, or "8/255"; the schema lets nothing else through."""
    return float(value) if isinstance(value, (int, float)) else float(Fraction(value))


class Experiments(Family):
    """See :class:`cupel.experiment.Family`."""

    NAME = "robust"
    SECTIONS = {"recipes": "recipe", "defences": "defences", "evaluations": "evaluations"}  # noqa: RUF012
    REGISTERED = {"kind": ("evaluation", "robust/evaluations.py")}  # noqa: RUF012
    DATA, FIRST = "images", "trained"
    REPORT_FILES = {"arrays": ("attacked", "evaluation.npz")}  # noqa: RUF012
    NEEDED = {"inner": ("eps", "ramp", "steps", "step_size"), "training": ("epochs", "lr", "batch_size")}  # noqa: RUF012

    def check(self) -> None:
        kinds = {**self.parameters["kind"], "points": POINTS}
        for name, entry in self.entries["defences"].items():
            if "weight" in (entry.get("settings") or {}) and self.function("defences", name) in WITHOUT_PENALTY:
                raise self.wrong("defences", name, "settings.weight", f"objective {self.function('defences', name)!r} has no "
                                                                      "penalty that a weight could apply to")
        for name, entry in self.entries["evaluations"].items():
            for place, settings in layers(entry):
                self.known("evaluations", name, place, "evaluation", settings, allowed=kinds)
                for kind, values in settings.items():
                    self.known("evaluations", name, f"{place}.{kind}", "parameter", values, allowed=kinds[kind])
                    self._check_evaluation(name, place, kind, values)
        for name, entry in self.entries["recipes"].items():
            for place, settings in layers(entry):
                begin, end = settings.get("inner", {}).get("ramp", (0, 0))
                if begin > end:
                    raise self.wrong("recipes", name, f"{place}.inner.ramp", f"it begins at step {begin}, after its end {end}")

    def _check_evaluation(self, name: str, place: str, kind: str, values: Mapping) -> None:
        """Values of one kind of an evaluation: ε and step sizes are of pixels in [0, 1]."""
        entry = self.registered["kind"].get(kind)
        defaults = entry.values if entry else dict.fromkeys(POINTS, 1)
        if not entry or entry.place.rpartition(":")[0] not in self.plugins:
            form = limits.form(self.NAME, "evaluations", kind, values, defaults)
            check_schema(values, form, f"{self.origin['evaluations', name]}: evaluations.{name}.{place}.{kind}")
        for key in ("eps", "step_size") if kind != "features" else ():
            given = values.get(key, [])
            for value in given if isinstance(given, list) else [] if isinstance(given, Mapping) else [given]:
                if fraction(value) > 1:
                    raise self.wrong("evaluations", name, f"{place}.{kind}.{key}",
                                     f"{value} is above 1, and pixels are in [0, 1]: 8 of 255 levels are 8/255")

    def check_block(self, where: str, block: Mapping) -> None:
        for dataset, model in itertools.product(block["datasets"], block["models"]):
            inner = self.check_needed({**block, "dataset": dataset, "model": model}, where)["inner"]
            for key in ("eps", "step_size"):
                if not 0 < fraction(inner[key]) <= 1:
                    raise ConfigError(f"{where}: recipe {block['recipe']} on {dataset}: inner.{key} {inner[key]} must be above "
                                      "0 and at most 1: pixels are in [0, 1], and 8 of 255 levels are 8/255")
        for dataset, name in itertools.product(block["datasets"], block.get("evaluations", [])):
            asked = self.evaluation({"evaluation": name, "dataset": dataset})
            count, known = asked.get("points", {}).get("count", 0), describe(dataset).sizes[1]
            if known and count > known:
                raise ConfigError(f"{where}: evaluation {name!r} asks for {count} points, {dataset} has {known} test images")
            if "unforeseen" in asked and dataset not in COLOUR:
                raise ConfigError(f"{where}: evaluation {name!r} has unforeseen attacks, which take colour images of a side "
                                  f"that 32 divides: not {dataset}")

    def expand(self, block: Mapping, where: str) -> Iterator[dict]:
        keys = ("dataset", "model", "seed", "defence")
        for dataset, model, seed, defence in itertools.product(*(block[f"{key}s"] for key in keys)):
            # `attack`, `rate` and `budget` are names by which the tidy table knows cells of every family
            network = {"dataset": dataset, "model": model, "recipe": block["recipe"], "defence": defence, "seed": str(seed),
                       "rate": "0", "budget": ""}
            yield {**network, "stage": "trained", "evaluation": "", "attack": ""}
            for name in block.get("evaluations", []):
                yield {**network, "stage": "attacked", "evaluation": name, "attack": name}

    def training(self, cell: Mapping) -> dict:
        """All that makes a network, as one plain dict: a change in it, and in nothing else, trains the network again."""
        return {"dataset": cell["dataset"], "model": cell["model"], "recipe": cell["recipe"], "method": cell["defence"],
                "seed": int(cell["seed"]), "function": self.function("defences", cell["defence"]),
                "parameters": self.settings("defences", cell["defence"], cell),
                "settings": self.settings("recipes", cell["recipe"], cell)}

    def evaluation(self, cell: Mapping) -> dict:
        """Settings of an evaluation for a data set: points, and parameters by kind."""
        return self.settings("evaluations", cell["evaluation"], cell)

    def evaluation_code(self, cell: Mapping) -> list[str]:
        """Where the kinds of an evaluation are defined: roots of a digest."""
        return [self.registered["kind"][kind].place for kind in self.evaluation(cell) if kind != "points"]

    def released(self, dataset: str) -> dict:
        """Evaluation of the authors' own networks, and the ε of their training: the same at every scale."""
        settings = overlaid(self.find("evaluations", "released"), dataset=dataset)
        recipe = overlaid(self.find("recipes", "main"), dataset=dataset)
        return {"settings": settings, "train_eps": fraction(recipe["inner"]["eps"])}

    def facts(self, paper: str, paths: Paths) -> dict:
        """What a report must know beside the tidy table: ε of the training as text by data set and recipe, γ of Int by
        defence, and class names by data set."""
        datasets = sorted(self.used("dataset", paper))
        eps = {dataset: {name: str(inner["eps"]) for name in self.entries["recipes"]
                         if "eps" in (inner := self.settings("recipes", name, {"dataset": dataset}).get("inner", {}))}
               for dataset in datasets}
        gammas = {name: (entry.get("settings") or {}).get("weight") for name, entry in self.entries["defences"].items()
                  if self.function("defences", name) == "int"}
        return {"train_eps": eps, "gammas": {name: gamma for name, gamma in gammas.items() if gamma is not None},
                "classes": {dataset: list(describe(dataset).classes) for dataset in datasets}}
