"""From experiment.yaml to cells: which networks are trained, and what each is measured with.

Plain Python over plain dicts, as in `cupel.grid`: the workflow uses it to plan, a notebook may use it to look around.

A cell of stage `trained` is a network: data set, model, recipe, method, seed. One of stage `attacked` is one evaluation of a
network. `method~variant` is a switch where paper and code differ, or an ablation.
"""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from cupel.grid import ConfigError
from cupel.images.datasets import describe
from cupel.registry import signatures, unknown

EVALUATIONS = Path(__file__).with_name("evaluations.py")
POINTS = {"count", "seed", "batch_size"}
WITHOUT_PENALTY = ("normal", "adv")
COLOUR = ("cifar10", "restricted_imagenet")


def fraction(value: float | str) -> float:
    """A number of a settings file: 0.3, or "8/255".

    Raises:
        ValueError: neither.
    """
    try:
        return float(value) if isinstance(value, (int, float)) else float(Fraction(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{value!r} is neither a number nor a fraction such as '8/255'") from None


def merged(entry: dict, dataset: str, scale: str) -> dict:
    """Settings of an entry, overlaid section by section by what it says for the data set, then for the scale."""
    settings: dict = {}
    for layer in (entry.get("settings"), (entry.get("datasets") or {}).get(dataset), (entry.get("scales") or {}).get(scale)):
        for section, values in (layer or {}).items():
            known = settings.get(section)
            settings[section] = {**(known or {}), **values} if isinstance(values, dict) else values
    return settings


class Plan:
    """What the experiment file of a paper of this family asks for at a scale.

    Args:
        paper: key.
        experiment: content of its experiment.yaml, already checked against the schema.
        file: its path, for messages.
        scale: name.
        seeds: instead of those of the scale; None keeps them.

    Raises:
        ConfigError: anything that would fail later in a job and can be known now.
    """

    def __init__(self, paper: str, experiment: dict, file: str | Path, scale: str, seeds: Iterable[int] | None = None):
        self.paper, self.experiment, self.file, self.scale = paper, experiment, file, scale
        self.recipes, self.methods = experiment.get("recipes") or {}, experiment.get("methods") or {}
        self.evaluations = experiment.get("evaluations") or {}
        self.parameters = signatures("evaluation", [EVALUATIONS])
        self._check_entries()
        self.blocks = experiment["scales"].get(scale, {}).get("blocks", [])
        self.cells = self._cells(list(seeds) if seeds else None)

    def _check_entries(self) -> None:
        for name, entry in self.methods.items():
            if "weight" in (entry.get("parameters") or {}) and self.objective(name) in WITHOUT_PENALTY:
                raise ConfigError(f"{self.file}: methods.{name}.parameters.weight: objective {self.objective(name)!r} has no "
                                  "penalty that a weight could apply to")
        for name, entry in self.evaluations.items():
            layers = [("settings", entry.get("settings"))]
            layers += [(f"{over}.{case}", layer) for over in ("datasets", "scales")
                       for case, layer in (entry.get(over) or {}).items()]
            for place, layer in layers:
                for kind, values in (layer or {}).items():
                    where = f"{self.file}: evaluations.{name}.{place}"
                    if kind != "points" and kind not in self.parameters:
                        raise ConfigError(f"{where}: {unknown('evaluation', kind, [*self.parameters, 'points'])}")
                    allowed = POINTS if kind == "points" else self.parameters[kind]
                    for parameter in values:
                        if parameter not in allowed:
                            raise ConfigError(f"{where}.{kind}: {unknown('parameter', parameter, allowed)}")
                    self._check_numbers(f"{where}.{kind}", values)
        for name, entry in self.recipes.items():
            for dataset in entry.get("datasets") or {}:
                inner = merged(entry, dataset, self.scale).get("inner", {})
                where = f"{self.file}: recipes.{name}.datasets.{dataset}.inner"
                self._check_numbers(where, {key: inner[key] for key in ("eps", "step_size") if key in inner})
                begin, end = inner.get("ramp", (0, 0))
                if begin > end:
                    raise ConfigError(f"{where}.ramp: it begins at step {begin}, after its end {end}")

    def _check_numbers(self, where: str, values: dict) -> None:
        for key in ("eps", "step_size"):
            for value in values[key] if isinstance(values.get(key), list) else [values[key]] if key in values else []:
                for number in value.values() if isinstance(value, dict) else [value]:
                    try:
                        fraction(number)
                    except ValueError as error:
                        raise ConfigError(f"{where}.{key}: {error}") from None

    def _cells(self, seeds: list[int] | None) -> list[dict]:
        """Networks, each followed by its evaluations; every one once, all values text."""
        found: dict[tuple, dict] = {}
        for number, block in enumerate(self.blocks):
            where = f"{self.file}: scales.{self.scale}.blocks.{number}"
            for key, known in (("recipe", self.recipes), ("methods", self.methods), ("evaluations", self.evaluations)):
                names = block.get(key, [])
                for name in [names] if key == "recipe" else names:
                    if name not in known:
                        raise ConfigError(f"{where}.{key}: {unknown(key.removesuffix('s'), name, known)}")
            for dataset in block["datasets"]:
                for name in block.get("evaluations", []):
                    if "unforeseen" in merged(self.evaluations[name], dataset, self.scale) and dataset not in COLOUR:
                        raise ConfigError(f"{where}: evaluation {name!r} has unforeseen attacks, which take colour images "
                                          f"of a side that 32 divides: not {dataset}")
                for model in block["models"]:
                    for seed in seeds or block.get("seeds") or self.experiment["scales"][self.scale]["seeds"]:
                        for method in block["methods"]:
                            network = {"paper": self.paper, "stage": "trained", "dataset": dataset, "model": model,
                                       "recipe": block["recipe"], "method": method, "seed": str(seed), "evaluation": ""}
                            for evaluation in ("", *block.get("evaluations", [])):
                                cell = {**network, "evaluation": evaluation,
                                        "stage": "attacked" if evaluation else "trained"}
                                # names by which the tidy table knows cells of every family
                                cell |= {"defence": method, "attack": evaluation, "rate": "0", "budget": ""}
                                found.setdefault(tuple(sorted(cell.items())), cell)
        return list(found.values())

    def objective(self, method: str) -> str:
        """Key of `objectives.METHODS` of a method."""
        return self.methods[method].get("function", method.partition("~")[0])

    def training(self, dataset: str, model: str, recipe: str, method: str, seed: str | int) -> dict:
        """All that makes a network, as one plain dict: a change in it, and in nothing else, trains the network again."""
        if recipe not in self.recipes:
            raise ConfigError(f"{unknown('recipe', recipe, self.recipes)} (in {self.file})")
        if method not in self.methods:
            raise ConfigError(f"{unknown('method', method, self.methods)} (in {self.file})")
        return {"dataset": dataset, "model": model, "recipe": recipe, "method": method, "seed": int(seed),
                "function": self.objective(method), "parameters": dict(self.methods[method].get("parameters") or {}),
                "settings": merged(self.recipes[recipe], dataset, self.scale)}

    def evaluation(self, name: str, dataset: str) -> dict:
        """Settings of an evaluation for a data set at this scale: points, and parameters by kind."""
        if name not in self.evaluations:
            raise ConfigError(f"{unknown('evaluation', name, self.evaluations)} (in {self.file})")
        return merged(self.evaluations[name], dataset, self.scale)

    def released(self, dataset: str) -> dict:
        """Evaluation of the authors' own networks, and the ε of their training: the same at every scale."""
        recipe = merged(self.recipes["main"], dataset, "")
        return {"settings": merged(self.evaluations["released"], dataset, ""), "train_eps": fraction(recipe["inner"]["eps"])}

    def datasets(self) -> list[str]:
        """Data sets in use."""
        return sorted({cell["dataset"] for cell in self.cells})

    def labels(self) -> dict[str, str]:
        """Names for people of the methods, in the order of experiment.yaml."""
        return {name: entry.get("label", name) for name, entry in self.methods.items()}

    def facts(self) -> dict:
        """What a report must know beside the tidy table: ε of the training as text by data set and recipe, γ of Int by
        method, and class names by data set."""
        eps = {dataset: {name: str(inner["eps"]) for name, entry in self.recipes.items()
                         if "eps" in (inner := merged(entry, dataset, self.scale).get("inner", {}))}
               for dataset in self.datasets()}
        gammas = {name: (self.methods[name].get("parameters") or {}).get("weight") for name in self.methods
                  if self.objective(name) == "int"}
        return {"train_eps": eps, "gammas": {name: gamma for name, gamma in gammas.items() if gamma is not None},
                "classes": {dataset: list(describe(dataset).classes) for dataset in self.datasets()}}
