"""What the papers on image classifiers ask for: triggers, victims, purified models.

A cell of stage `victim` is a classifier trained on a poisoned set (`clean`: its twin without poison), `purified` what a defence
makes of it with a budget of clean data. `name~variant` is a switch where paper and code differ, or an ablation.
"""

from collections.abc import Iterator, Mapping

from cupel.experiment import Family, overlaid
from cupel.images.datasets import NAMES as DATASETS
from cupel.images.datasets import describe
from cupel.paths import Paths
from cupel.registry import unknown
from cupel.settings import ConfigError

#: in a path, instead of a mirror: nothing can be run with it
UNSET = "(data.mirror is not set)"
#: what a recipe may change in a network, and how it is otherwise
FORM = {"width": 64, "stem_stride": 1, "pretrained": False}
CLEAN = {"name": "clean", "function": "none", "settings": {}}


class Experiments(Family):
    """See :class:`cupel.experiment.Family`."""

    NAME = "images"
    SECTIONS = {"recipes": "recipe", "attacks": "attacks", "defences": "defences", "budgets": "budgets"}  # noqa: RUF012
    REGISTERED = {kind: (kind, f"images/{kind}s/*.py") for kind in ("attack", "dataset", "defence", "model")}  # noqa: RUF012
    REPORT_FILES = {"histories": ("victim", "history.csv")}  # noqa: RUF012
    NEEDED = {"training": ("epochs", "lr")}  # noqa: RUF012

    def check(self) -> None:
        for kind in ("attack", "defence"):
            # what a plugin registers can be asked for without an entry
            for name, entry in self.registered[kind].items():
                if entry.place.rpartition(":")[0] in self.plugins:
                    self.entries[f"{kind}s"].setdefault(name, {})
        for parameters in self.parameters["attack"].values():
            parameters.add("smaller")  # of the preparation, for every attack
        self.check_functions("attacks", "defences")
        self.entries["attacks"]["clean"] = CLEAN  # no attack, it is the twin of all
        for name in self.entries["budgets"]:
            settings = self.settings("budgets", name)
            if settings.get("kind") == "spc" and "spc" not in settings:
                raise self.wrong("budgets", name, "settings", "kind spc needs spc, the samples of each class")

    def check_block(self, where: str, block: Mapping) -> None:
        super().check_block(where, block)
        for kind, known in (("dataset", (*DATASETS, *self.registered["dataset"])), ("model", self.registered["model"])):
            for name in block[f"{kind}s"]:
                if name not in known:
                    raise ConfigError(f"{where}.{kind}s: {unknown(kind, name, known)}")

    def follow(self, victim: dict, block: Mapping, where: str) -> Iterator[dict]:
        victim = {**victim, "rate": "0"} if victim["attack"] == "clean" else victim
        self.check_victim(victim, where)
        recipe = self.check_needed(victim, where)
        changed = [key for key, value in recipe.get("model", {}).items() if value != FORM[key]]
        self.known("recipes", victim["recipe"], "settings.model", f"setting of model {victim['model']}", changed,
                   allowed=self.parameters["model"][victim["model"]] & FORM.keys())
        for name in block.get("budgets", []) if block.get("defences") else []:
            budget = self.settings("budgets", name, victim)
            if "held_out" in (budget["kind"], budget.get("pool")) and not recipe.get("held_out"):
                raise ConfigError(f"{where}.budgets: budget {name} uses held-out images, but recipe {victim['recipe']} holds "
                                  "out none (held_out)")
            for defence in block["defences"] if budget.get("spc") == 1 else []:
                if "validation" in self.parameters["defence"].get(self.function("defences", defence), ()):
                    raise ConfigError(f"{where}.budgets: budget {name} has one image of each class, and {defence} sets some "
                                      "aside to choose by (validation): spc 2 or more")
        yield from super().follow(victim, block, where)

    def check_victim(self, cell: Mapping, where: str = "asked for by path") -> None:
        """The rate poisons a sample, and the data set has the target class, and enough images of it for an attack that poisons
        no other.

        Raises:
            ConfigError: it has not.
        """
        if cell["dataset"] in self.registered["dataset"]:
            return  # a plugin's is not known before it is imported
        if cell["dataset"] not in DATASETS:
            raise ConfigError(f"{where}: {unknown('dataset', cell['dataset'], (*DATASETS, *self.registered['dataset']))}")
        known, recipe = describe(cell["dataset"]), self.recipe(cell)
        classes, target = len(known.classes), recipe.get("target", 0)
        size = min(recipe.get("train_size") or known.sizes[0] or 10**9, known.sizes[0] or 10**9)
        if cell["attack"] != "clean" and not round(float(cell["rate"]) * size):
            raise ConfigError(f"{where}: attack {cell['attack']} at rate {cell['rate']} poisons none of {size} images of "
                              f"{cell['dataset']}; the twin without poison is the attack clean")
        if target >= classes:
            raise ConfigError(f"{where}: recipe {cell['recipe']}: target {target}, but {cell['dataset']} has the classes "
                              f"0 to {classes - 1}")
        entry = self.entry("attack", cell["attack"])
        said = {**(entry.values if entry else {}), **self.settings("attacks", cell["attack"], cell)}
        clean_label = said.get("sig_policy") == "clean_label" or ("sig_policy" not in said and said.get("policy") == "clean")
        counts = known.counts[0] if known.counts else [1] * classes if known.balanced else None
        if clean_label and counts and float(cell["rate"]) > 1.001 * counts[target] / sum(counts):  # a job knows to the image
            raise ConfigError(f"{where}: attack {cell['attack']} poisons the target class alone, and class {target} is "
                              f"{counts[target] / sum(counts):.4g} of {cell['dataset']}: rate {cell['rate']} is impossible")

    def attack(self, name: str, dataset: str) -> dict:
        """Name, function and settings of an attack; a path that begins with `mirror:` points into the user's mirror."""
        settings = {key: value.replace("mirror:", f"{self.mirror or UNSET}/", 1)
                    if isinstance(value, str) and value.startswith("mirror:") else value
                    for key, value in self.settings("attacks", name, {"dataset": dataset}).items()}
        return {"name": name, "function": self.function("attacks", name), "settings": settings}

    def recipe(self, cell: Mapping) -> dict:
        """Settings of a victim's recipe, with what its attack changes in the training."""
        settings = self.settings("recipes", cell["recipe"], cell)
        changes = overlaid(self.find("attacks", cell["attack"]).get("training") or {}, scale=self.scale)
        return {**settings, "training": {**settings.get("training", {}), **changes}}

    def victim(self, cell: Mapping) -> dict:
        """All that makes a victim, as one plain dict: a change in it, and in nothing else, trains the victim again."""
        self.check_victim(cell)
        return {"dataset": cell["dataset"], "model": cell["model"], "recipe": cell["recipe"],
                "attack": self.attack(cell["attack"], cell["dataset"]), "poison_rate": float(cell["rate"]),
                "seed": int(cell["seed"]), "settings": self.recipe(cell)}

    def trigger(self, cell: Mapping) -> dict:
        """What a trigger depends on: not on the poison rate, nor on what its attack changes in the training."""
        return {"dataset": cell["dataset"], "attack": self.attack(cell["attack"], cell["dataset"]),
                "seed": int(cell["seed"]), "settings": self.settings("recipes", cell["recipe"], cell)}

    def defence(self, cell: Mapping) -> dict:
        """Name, function, settings and budget of a purified cell."""
        return {"name": cell["defence"], "function": self.function("defences", cell["defence"]),
                "settings": self.settings("defences", cell["defence"], cell),
                "budget": {"name": cell["budget"], **self.settings("budgets", cell["budget"], cell)}}

    def needs(self, name: str) -> str:
        """What an attack must be given beforehand, `data` or `clean_model`; nothing: ""."""
        entry = self.entry("attack", name)
        return entry.values.get("needs", "") if entry else ""

    def report_labels(self, paper: str) -> dict[str, dict[str, str]]:
        labels, used = self.labels("defences"), self.used("defence", paper)
        return {"defences": {name: label for name, label in labels.items() if name in used}}

    def facts(self, paper: str, paths: Paths) -> dict:
        """Kind of the defences in use, and their settings with the defaults of what is not given."""
        cells = {(cell["defence"], cell["dataset"]): cell for cell in self.cells
                 if cell["paper"] == paper and "defence" in cell}
        used = {name: self.defence(cell) for (name, _), cell in cells.items()}
        defaults = {name: self.entry("defence", name).values for name in used}
        return {"kinds": {name: self.find("defences", name).get("kind", "") for name in used},
                "defences": {name: {**entry, "settings": defaults[name] | entry["settings"]} for name, entry in used.items()}}
