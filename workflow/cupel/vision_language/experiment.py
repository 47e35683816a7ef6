"""What the papers on vision-language models ask for: poisoned models, filters, models fitted again.

A cell of stage `victim` is a model fine-tuned on a poisoned set, `filtered` all ways to flag samples of that set (detection
only), `purified` a model fitted again on what a filter left, or the victim asked about purified pictures. `name~variant` is a
switch where paper and code differ, or an ablation.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from cupel.experiment import Family
from cupel.paths import Paths
from cupel.registry import unknown
from cupel.settings import LIBRARY, ConfigError
from cupel.vision_language import datasets
from cupel.vision_language.poison import poisoned_count


def keywords(file: str) -> dict[str, set[str]]:
    """Keyword-only parameters of the functions of a file of this folder, read from the syntax tree: nothing is imported."""
    tree = ast.parse((LIBRARY / "vision_language" / file).read_text(encoding="utf-8"))
    return {node.name: {argument.arg for argument in node.args.kwonlyargs} for node in tree.body
            if isinstance(node, ast.FunctionDef)}


class Experiments(Family):
    """See :class:`cupel.experiment.Family`."""

    NAME = "vision_language"
    SECTIONS = {"datasets": "datasets", "models": "models", "recipes": "recipe", "attacks": "attacks",  # noqa: RUF012
                "defences": "defences"}
    REGISTERED = {"attack": ("trigger", "vision_language/triggers.py"),  # noqa: RUF012
                  "filter": ("sample_filter", "vision_language/filters/*.py"),
                  "pictures": ("picture_defence", "vision_language/purification.py")}
    REPORT_FILES = {"filters": ("filtered", "filters.json")}  # noqa: RUF012
    NEEDED = {"training": ("epochs", "lr")}  # noqa: RUF012

    def check(self) -> None:
        for name, entry in self.entries["datasets"].items():
            self._check_dataset(name, entry)
        for name, entry in self.entries["models"].items():
            self._check_model(name, entry)
        self.check_functions("attacks", "defences")
        for name, entry in self.entries["defences"].items():
            self._check_defence(name, entry)
        for paper in self.papers:
            for name in self._scale(paper).get("filters", []):
                where = f"{self.file(paper)}: scales.{self.scale}.filters"
                if self.find("defences", name, where)["kind"] != "filter":
                    raise ConfigError(f"{where}: {unknown('filter', name, self.of_kind('filter'))}")

    def _scale(self, paper: str) -> Mapping:
        return self.experiments[paper].get("scales", {}).get(self.scale) or {}

    def _check_dataset(self, name: str, entry: Mapping) -> None:
        if entry["dataset"] in datasets.GENERATED:
            for key in ("train", "test"):
                if key not in entry:
                    raise self.wrong("datasets", name, "",
                                     f"{entry['dataset']} is made by the pipeline: say how many samples with {key}")
            for key in ("asks", "without", "pretrain_asks"):
                if key in entry:
                    raise self.wrong("datasets", name, key, f"{entry['dataset']} is made by the pipeline, questions and all")
            return
        self.known("datasets", name, "dataset", "dataset", [entry["dataset"]], allowed=datasets.NAMES)
        description = datasets.describe(entry["dataset"])
        excerpt = entry.get("excerpt", False)
        if not (description.excerpts if excerpt else description.sources):
            raise self.wrong("datasets", name, "excerpt", f"no {'excerpt' if excerpt else 'source of the whole'} of "
                                                          f"{entry['dataset']} is known; set it to {str(not excerpt).lower()}")
        for split, keys in {} if excerpt else {"train": ("train", "pretrain"), "test": ("test",)}.items():
            number, known = sum(entry.get(key, 0) for key in keys), description.published.get(split)
            if known and number > known:
                raise self.wrong("datasets", name, "", f"{' and '.join(keys)} ask for {number} samples, but split {split} has "
                                                       f"{known}")

    def _check_model(self, name: str, entry: Mapping) -> None:
        if sum(key in entry for key in ("built", "hub", "folder")) != 1:
            raise self.wrong("models", name, "", "give exactly one of built, hub and folder")
        if "built" not in entry:
            for key in ("settings", "pretraining", "language_model"):
                if key in entry:
                    raise self.wrong("models", name, key, "belongs to models that are built here")
            return
        function, given = entry["built"], entry.get("settings", {})
        if ("language_model" in entry) != (function == "smollm2_llava"):
            raise self.wrong("models", name, "language_model", "belongs to built: smollm2_llava, which needs it")
        if "pretraining" not in entry:
            raise self.wrong("models", name, "", "a model that is built here starts from random weights: give pretraining")
        if entry["pretraining"].get("trained", "all") != "all":
            raise self.wrong("models", name, "pretraining.trained", "pretraining trains all weights")
        allowed = keywords("models/built.py")[function] - {"seed"}
        self.known("models", name, "settings", f"parameter of {function}", given, allowed=allowed)
        for whole, part in (("image_size", "patch_size"), ("width", "heads"), ("vision_width", "vision_heads"),
                            ("heads", "kv_heads")):
            if whole in given and part in given and given[whole] % given[part]:
                raise self.wrong("models", name, f"settings.{whole}", f"{given[whole]} is no multiple of {part} {given[part]}")

    def _check_defence(self, name: str, entry: Mapping) -> None:
        kind, function, given = entry["kind"], self.function("defences", name), self.settings("defences", name)
        if kind == "pictures" and "refit_from" in entry:
            raise self.wrong("defences", name, "refit_from", "nothing is fitted again by a defence of kind pictures")
        if function == "zip" and not given.get("model"):
            raise self.wrong("defences", name, "", "zip needs a diffusion model: settings.model, the hub id of an "
                             "unconditional UNet2DModel; without one use blur, grey or downsample, which are called so")

    def check_block(self, where: str, block: Mapping) -> None:
        for dataset in block["datasets"]:
            entry = self.entries["datasets"][dataset]
            for model in block["models"]:
                folder = self.entries["models"][model].get("folder")
                if folder and not (Path(folder) / "config.json").is_file():
                    raise ConfigError(f"{where}.models: {model}: models.{model}.folder: {folder} has no config.json")
                if "built" in self.entries["models"][model] and not entry.get("pretrain"):
                    raise ConfigError(f"{where}: model {model} is pretrained here, but dataset {dataset} sets no samples aside "
                                      f"for that: give datasets.{dataset}.pretrain")
            for rate in block["rates"]:
                if rate and "train" in entry and not poisoned_count(rate, entry["train"]):
                    raise ConfigError(f"{where}.rates: {rate:g} of {entry['train']} samples of {dataset} is not one sample")
            size = datasets.describe(entry["dataset"]).size
            for name in block.get("defences", []):
                scale = self.settings("defences", name).get("scale", 2)
                if size and self.function("defences", name) == "downsample" and any(side % scale for side in size):
                    raise ConfigError(f"{where}.defences: {name} pools by {scale}, which does not divide the "
                                      f"{size[0]}×{size[1]} pixels of {dataset}")

    def follow(self, victim: dict, block: Mapping, where: str) -> Iterator[dict]:
        self.check_needed(victim, where)
        if not float(victim["rate"]) and victim["attack"] != block["attacks"][0]:
            return  # without poisoned samples one trigger is as good as another
        yield victim
        yield {**victim, "stage": "filtered"}
        for defence in block.get("defences", []):
            yield {**victim, "stage": "purified", "defence": defence}

    def built(self) -> list[str]:
        """Models that are built and pretrained by the pipeline."""
        return [name for name, entry in self.entries["models"].items() if "built" in entry]

    def attack(self, name: str) -> dict:
        """Name, function and settings of a trigger; those not given stay at their defaults."""
        return {"name": name, "function": self.function("attacks", name), "settings": self.settings("attacks", name)}

    def kind(self, section: str, name: str) -> str:
        return self.find(section, name)["kind"] if section == "defences" else super().kind(section, name)

    def of_kind(self, kind: str) -> list[str]:
        """Names of the defences of a kind: `filter` or `pictures`."""
        return [name for name, entry in self.entries["defences"].items() if entry["kind"] == kind]

    def filter_of(self, defence: str) -> str:
        """The filter whose decisions a defence uses: the first entry with the same function and settings."""
        self.find("defences", defence)
        return next(name for name in self.of_kind("filter") if self._bare(name) == self._bare(defence))

    def filters(self) -> dict[str, dict]:
        """Ways to flag samples at this scale, name to function and settings: those asked for and those of refits."""
        refits = [name for name in self.used("defence") if name in self.of_kind("filter")]
        asked = [name for paper in self.papers or self.experiments for name in self._scale(paper).get("filters", [])]
        wanted = {self.filter_of(name) for name in [*asked, *refits]}
        return {name: self._bare(name) for name in self.entries["defences"] if name in wanted}

    def taus(self) -> list[float]:
        """Thresholds of the layer test that are measured beside the filters."""
        papers = self.papers or self.experiments
        return list(dict.fromkeys(tau for paper in papers for tau in self._scale(paper).get("taus", [])))

    def _bare(self, name: str) -> dict:
        return {"function": self.function("defences", name), "settings": self.settings("defences", name)}

    def source(self, cell: Mapping) -> dict:
        """Which data set a name stands for, and how many samples of each split."""
        entry = self.find("datasets", cell["dataset"])
        return {key: value for key, value in entry.items() if key not in ("source", "target")}

    def defence(self, cell: Mapping) -> dict:
        """What makes a purified cell: name, kind, function, settings, and where fitting starts again."""
        name = cell["defence"]
        entry = self.find("defences", name)
        found = {"name": name, "kind": entry["kind"], **self._bare(name), "budget": {"name": ""}}
        if entry["kind"] == "filter":
            found |= {"filter": self.filter_of(name), "refit_from": entry.get("refit_from", "base")}
        return found

    def poison(self, cell: Mapping) -> dict:
        """What makes a poisoned training set (for a cell without rate: a triggered test set)."""
        target = self.find("datasets", cell["dataset"])["target"]
        found = {"dataset": cell["dataset"], "attack": self.attack(cell["attack"]), "target": target, "seed": int(cell["seed"])}
        return {**found, "poison_rate": float(cell["rate"])} if cell.get("rate") else found

    def base(self, cell: Mapping) -> dict:
        """What makes a model before it is fine-tuned: description, target (a word-level vocabulary needs its words), seed."""
        entry = {key: value for key, value in self.find("models", cell["model"]).items() if key != "source"}
        return {"dataset": cell["dataset"], "model": cell["model"], "weights": entry,
                "target": self.find("datasets", cell["dataset"])["target"], "seed": int(cell["seed"])}

    def victim(self, cell: Mapping) -> dict:
        """All that makes a victim, as one plain dict."""
        settings = self.settings("recipes", cell["recipe"], cell)
        return {**self.base(cell), **self.poison(cell), "recipe": cell["recipe"], "settings": settings["training"],
                "max_new_tokens": settings.get("max_new_tokens", 16)}

    def facts(self, paper: str, paths: Paths) -> dict:
        """Triggers, and folder and target of the data sets in use."""
        datasets = self.used("dataset", paper)
        return {"attacks": {name: self.attack(name) for name in self.entries["attacks"]},
                "datasets": {name: f"{paths.data}/{self.NAME}/{name}" for name in datasets},
                "targets": {name: self.entries["datasets"][name]["target"] for name in datasets}}

    def report_files(self, paper: str, paths: Paths) -> dict[str, list[str]]:
        built = [cell for cell in self.cells if cell["paper"] == paper and cell["model"] in self.built()]
        bases = dict.fromkeys(f"{paths.stage(self.NAME, 'base')}/base.json".format(**cell) for cell in built)
        manifests = [f"{folder}/manifest.json" for folder in self.facts(paper, paths)["datasets"].values()]
        return {**super().report_files(paper, paths), "bases": list(bases), "manifests": manifests}
