"""From experiment.yaml to cells: which poisoned models, which filters, which models fitted again.

Plain Python over plain dicts, as in `cupel.grid`: the workflow uses it to plan, a notebook may use it to look around. A cell
of stage `victim` is a model fine-tuned on a poisoned set, `filtered` all ways to flag samples of that set (detection only),
`purified` a model fitted again on what a filter left, or the victim asked about purified pictures. `name~variant` is a switch
where paper and code differ, or an ablation.
"""

import ast
from collections.abc import Iterable
from pathlib import Path

from cupel.grid import ConfigError
from cupel.registry import signatures, unknown
from cupel.vision_language import datasets
from cupel.vision_language.poison import poisoned_count

FOLDER = Path(__file__).parent
GENERATED = "shapes"  # the dataset that the pipeline makes itself
#: what a plan calls it → decorator of the registry, and where the library has its own
KINDS = {"trigger": ("trigger", "triggers.py"), "filter": ("sample_filter", "filters/*.py"),
         "pictures": ("picture_defence", "purification.py")}
SHARES = ("share", "recall")


def keywords(file: str) -> dict[str, set[str]]:
    """Keyword-only parameters of the functions of a file of this folder, read from the syntax tree: nothing is imported."""
    tree = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
    return {node.name: {argument.arg for argument in node.args.kwonlyargs} for node in tree.body
            if isinstance(node, ast.FunctionDef)}


def registered(kind: str, plugins: Iterable[str | Path] = ()) -> dict[str, tuple[Path, set[str]]]:
    """Triggers, filters or picture defences by name (see `KINDS`), each with its file and its settings; nothing is imported."""
    decorator, own = KINDS[kind]
    files = [*sorted(FOLDER.glob(own)), *map(Path, plugins)]
    return {name: (file, settings) for file in files for name, settings in signatures(decorator, [file]).items()}


class Plan:
    """What the experiment file of a paper of this family asks for at a scale.

    Args:
        paper: key.
        experiment: content of its experiment.yaml, already checked against the schema.
        file: its path, for messages.
        scale: name.
        seeds: instead of those of the scale; None keeps them.
        plugins: files that register more triggers, filters and picture defences.

    Raises:
        ConfigError: anything that would fail later in a job and can be known now.
    """

    def __init__(self, paper: str, experiment: dict, file: str | Path, scale: str, seeds: Iterable[int] | None = None, *,
                 plugins: Iterable[str | Path] = ()):
        self.paper, self.experiment, self.file, self.scale = paper, experiment, file, scale
        self.registered = {kind: registered(kind, plugins) for kind in KINDS}
        for section in ("datasets", "models", "recipes", "attacks", "defences"):
            setattr(self, section, experiment[section])
        self.target = experiment["target"]
        self._check_datasets()
        self._check_models()
        self._check_attacks()
        self._check_defences()
        settings = experiment["scales"].get(scale, {"seeds": [0], "filters": [], "blocks": []})
        self.blocks, self.taus = settings["blocks"], settings.get("taus", [])
        self.asked = settings["filters"]
        self._check_scale()
        self.cells = self._cells(list(seeds) if seeds else None, settings["seeds"])

    def _wrong(self, where: str, what: str) -> ConfigError:
        return ConfigError(f"{self.file}: {where}: {what}")

    def _check_datasets(self) -> None:
        for name, entry in self.datasets.items():
            where = f"datasets.{name}"
            if entry["dataset"] == GENERATED:
                for key in ("train", "test"):
                    if key not in entry:
                        raise self._wrong(where, f"{GENERATED} is made by the pipeline: say how many samples with {key}")
                continue
            if entry["dataset"] not in datasets.NAMES:
                raise self._wrong(f"{where}.dataset", unknown("dataset", entry["dataset"], datasets.NAMES))
            description = datasets.describe(entry["dataset"])
            excerpt = entry.get("excerpt", False)
            if not (description.excerpts if excerpt else description.sources):
                raise self._wrong(f"{where}.excerpt", f"no {'excerpt' if excerpt else 'source of the whole'} of "
                                                      f"{entry['dataset']} is known; set it to {str(not excerpt).lower()}")
            for split, keys in {} if excerpt else {"train": ("train", "pretrain"), "test": ("test",)}.items():
                number, known = sum(entry.get(key, 0) for key in keys), description.published.get(split)
                if known and number > known:
                    raise self._wrong(where, f"{' and '.join(keys)} ask for {number} samples, but split {split} has {known}")

    def _check_models(self) -> None:
        built = keywords("models/built.py")
        for name, entry in self.models.items():
            where = f"models.{name}"
            if sum(key in entry for key in ("built", "hub", "folder")) != 1:
                raise self._wrong(where, "give exactly one of built, hub and folder")
            if "built" not in entry:
                for key in ("parameters", "pretraining", "language_model"):
                    if key in entry:
                        raise self._wrong(f"{where}.{key}", "belongs to models that are built here")
                continue
            function, given = entry["built"], entry.get("parameters", {})
            if ("language_model" in entry) != (function == "smollm2_llava"):
                raise self._wrong(f"{where}.language_model", "belongs to built: smollm2_llava, which needs it")
            if "pretraining" not in entry:
                raise self._wrong(where, "a model that is built here starts from random weights: give pretraining")
            if entry["pretraining"].get("trained", "all") != "all":
                raise self._wrong(f"{where}.pretraining.trained", "pretraining trains all weights")
            allowed = built[function] - {"seed"}
            for key in given:
                if key not in allowed:
                    raise self._wrong(f"{where}.parameters", unknown(f"parameter of {function}", key, allowed))
            for whole, part in (("image_size", "patch_size"), ("width", "heads"), ("vision_width", "vision_heads"),
                                ("heads", "kv_heads")):
                if whole in given and part in given and given[whole] % given[part]:
                    raise self._wrong(f"{where}.parameters.{whole}", f"{given[whole]} is no multiple of {part} {given[part]}")

    def _check_attacks(self) -> None:
        for name, entry in self.attacks.items():
            function = self._function("attacks", name)
            known = self.registered["trigger"]
            if function not in known:
                raise self._wrong(f"attacks.{name}", unknown("trigger", function, known))
            allowed = known[function][1]
            for key in entry.get("parameters", {}):
                if key not in allowed:
                    raise self._wrong(f"attacks.{name}.parameters", unknown(f"parameter of {function}", key, allowed))

    def _check_defences(self) -> None:
        known = {kind: {name: settings for name, (_, settings) in found.items()} for kind, found in self.registered.items()}
        for name, entry in self.defences.items():
            kind, function, given = entry["kind"], self._function("defences", name), entry.get("hyperparameters", {})
            where = f"defences.{name}"
            if function not in known[kind]:
                raise self._wrong(where, unknown(f"defence of kind {kind}", function, known[kind]))
            for key, value in given.items():
                here = f"{where}.hyperparameters.{key}"
                if key not in known[kind][function]:
                    raise self._wrong(f"{where}.hyperparameters",
                                      unknown(f"hyperparameter of {function}", key, known[kind][function]))
                if key == "rule" and value not in ("rss", "sum"):
                    raise self._wrong(here, f"{value!r} is not allowed; allowed are rss (paper), sum (official code)")
                if key in SHARES and not (isinstance(value, (int, float)) and 0 <= value <= 1):
                    raise self._wrong(here, f"{value!r} should be a fraction from 0 to 1")
                if key == "threshold" and value != "scaled" and not isinstance(value, (int, float)):
                    raise self._wrong(here, f"{value!r} should be a number of nats, or scaled")
            if kind == "pictures" and "refit_from" in entry:
                raise self._wrong(f"{where}.refit_from", "nothing is fitted again by a defence of kind pictures")
            if function == "zip" and not given.get("model"):
                raise self._wrong(where, "zip needs a diffusion model: hyperparameters.model, the hub id of an unconditional "
                                         "UNet2DModel; without one use blur, grey or downsample, which are called so")

    def _check_scale(self) -> None:
        where = f"scales.{self.scale}"
        for name in self.asked:
            if name not in self.defences or self.defences[name]["kind"] != "filter":
                kinds = [key for key, entry in self.defences.items() if entry["kind"] == "filter"]
                raise self._wrong(f"{where}.filters", unknown("filter", name, kinds))
        for number, block in enumerate(self.blocks):
            here = f"{where}.blocks.{number}"
            for key in ("datasets", "models", "attacks", "defences"):
                for name in block.get(key, []):
                    if name not in getattr(self, key):
                        raise self._wrong(f"{here}.{key}", unknown(key[:-1], name, getattr(self, key)))
            if block["recipe"] not in self.recipes:
                raise self._wrong(f"{here}.recipe", unknown("recipe", block["recipe"], self.recipes))
            for dataset in block["datasets"]:
                self._check_dataset(here, block, dataset)

    def _check_dataset(self, where: str, block: dict, dataset: str) -> None:
        entry = self.datasets[dataset]
        for model in block["models"]:
            if "built" in self.models[model] and not entry.get("pretrain"):
                raise self._wrong(where, f"model {model} is pretrained here, but dataset {dataset} sets no samples aside for "
                                         f"that: give datasets.{dataset}.pretrain")
        for rate in block["rates"]:
            if rate and "train" in entry and not poisoned_count(rate, entry["train"]):
                raise self._wrong(f"{where}.rates", f"{rate:g} of {entry['train']} samples of {dataset} is not one sample")
        size = datasets.describe(entry["dataset"]).size
        for name in block.get("defences", []):
            scale = self.defences[name].get("hyperparameters", {}).get("scale", 2)
            if size and self._function("defences", name) == "downsample" and any(side % scale for side in size):
                raise self._wrong(f"{where}.defences", f"{name} pools by {scale}, which does not divide the "
                                                       f"{size[0]}×{size[1]} pixels of {dataset}")

    def _cells(self, seeds: list[int] | None, usual: list[int]) -> list[dict]:
        """Victims, each followed by its filters and its purified models; every one once, all values text."""
        found: dict[tuple, dict] = {}
        for block in self.blocks:
            for dataset in block["datasets"]:
                for model in block["models"]:
                    for seed in seeds or block.get("seeds") or usual:
                        for attack in block["attacks"]:
                            for rate in block["rates"]:
                                if not rate and attack != block["attacks"][0]:
                                    continue  # without poisoned samples one trigger is as good as another
                                victim = {"paper": self.paper, "dataset": dataset, "model": model, "recipe": block["recipe"],
                                          "attack": attack, "rate": f"{rate:g}", "seed": str(seed)}
                                cells = [{**victim, "stage": "victim"}, {**victim, "stage": "filtered"}]
                                cells += [{**victim, "stage": "purified", "defence": name}
                                          for name in block.get("defences", [])]
                                for cell in cells:
                                    found.setdefault(tuple(sorted(cell.items())), cell)
        return list(found.values())

    def _function(self, section: str, name: str) -> str:
        return getattr(self, section)[name].get("function", name.partition("~")[0])

    def find(self, section: str, name: str) -> dict:
        """An entry of `datasets`, `models`, `recipes`, `attacks` or `defences`.

        Raises:
            ConfigError: there is none of this name.
        """
        entries = getattr(self, section)
        if name not in entries:
            raise ConfigError(f"{self.file}: {unknown(section[:-1], name, entries)}")
        return entries[name]

    def used(self, key: str, stage: str | None = None) -> list[str]:
        """Distinct values of a key of the cells, in the order in which they come first."""
        return list(dict.fromkeys(cell[key] for cell in self.cells if key in cell and stage in (None, cell["stage"])))

    def built(self) -> list[str]:
        """Models that are built and pretrained by the pipeline."""
        return [name for name, entry in self.models.items() if "built" in entry]

    def attack(self, name: str) -> dict:
        """Name, function and parameters of a trigger; those not given stay at their defaults."""
        parameters = dict(self.find("attacks", name).get("parameters", {}))
        return {"name": name, "function": self._function("attacks", name), "parameters": parameters}

    def filter_of(self, defence: str) -> str:
        """The filter whose decisions a defence uses: the first entry with the same function and hyperparameters."""
        def settings(name: str) -> tuple:
            return self._function("defences", name), sorted(self.defences[name].get("hyperparameters", {}).items())

        self.find("defences", defence)
        return next(name for name in self.defences
                    if self.defences[name]["kind"] == "filter" and settings(name) == settings(defence))

    def filters(self) -> dict[str, dict]:
        """Ways to flag samples at this scale, name to function and hyperparameters: those asked for and those of refits."""
        refits = [name for name in self.used("defence") if self.defences[name]["kind"] == "filter"]
        wanted = {self.filter_of(name) for name in [*self.asked, *refits]}
        return {name: self._bare(name) for name in self.defences if name in wanted}

    def _bare(self, name: str) -> dict:
        return {"function": self._function("defences", name),
                "hyperparameters": dict(self.defences[name].get("hyperparameters", {}))}

    def defence(self, name: str) -> dict:
        """What makes a purified cell: name, kind, function, hyperparameters, and where fitting starts again."""
        entry = self.find("defences", name)
        found = {"name": name, "kind": entry["kind"], **self._bare(name), "budget": {"name": ""}}
        if entry["kind"] == "filter":
            found |= {"filter": self.filter_of(name), "refit_from": entry.get("refit_from", "base")}
        return found

    def poison(self, dataset: str, attack: str, rate: str, seed: str) -> dict:
        """What makes a poisoned training set (with an empty rate: a triggered test set)."""
        self.find("datasets", dataset)
        found = {"dataset": dataset, "attack": self.attack(attack), "target": self.target, "seed": int(seed)}
        return {**found, "poison_rate": float(rate)} if rate else found

    def base(self, dataset: str, model: str, seed: str) -> dict:
        """What makes a model before it is fine-tuned: description, target (a word-level vocabulary needs its words), seed."""
        self.find("datasets", dataset)
        entry = {key: value for key, value in self.find("models", model).items() if key != "source"}
        return {"dataset": dataset, "model": model, "weights": entry, "target": self.target, "seed": int(seed)}

    def victim(self, dataset: str, model: str, recipe: str, attack: str, rate: str, seed: str) -> dict:
        """All that makes a victim, as one plain dict."""
        entry = self.find("recipes", recipe)
        return {**self.base(dataset, model, seed), **self.poison(dataset, attack, rate, seed), "recipe": recipe,
                "settings": dict(entry["settings"]), "max_new_tokens": entry.get("max_new_tokens", 16)}

    def code(self, kind: str, function: str) -> Path:
        """The file that registers a trigger, filter or picture defence."""
        return self.registered[kind][function][0]

    def labels(self, section: str) -> dict[str, str]:
        """Names for people of the `attacks` or `defences`, in the order of the file."""
        return {name: entry.get("label", name) for name, entry in getattr(self, section).items()}
