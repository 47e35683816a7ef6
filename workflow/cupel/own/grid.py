"""Models of the user in a grid: one YAML names them, defences, budgets and seeds.

A study is a model with a budget and a seed. Its folder is `<model>/<budget>/seed<k>`, and in the end holds what `cupel purify`
writes. A grid is made in the parts below, which one process or many may do: `look`, then `purify` for each defence, then
`report`, and `gather` over all studies.
"""

import functools
import itertools
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from cupel import limits, prepared
from cupel.cells import read_tensors, write_tensors
from cupel.digest import code_digest
from cupel.experiment import registered
from cupel.files import digest, read_json, write_json, write_text
from cupel.own import USUAL
from cupel.own.normalisations import normalisation
from cupel.registry import unknown
from cupel.settings import ConfigError, check_schema, read_yaml, schema


class Grid:
    """What a YAML asks for, checked before anything is run, and before anything heavy is imported.

    Attributes:
        models: by name, what `cupel.own.suspect.opened` takes.
        defences: settings by name.
        budgets, seeds, plugins: as they are given.
        studies: model, budget and seed of each.

    Raises:
        ConfigError: what would fail later and can be known now; a sentence for each mistake.
    """

    def __init__(self, path: str | Path):
        content, form = read_yaml(path), schema("own")
        check_schema(content, form, path)
        content = {key: content.get(key, part.get("default")) for key, part in form["properties"].items()}
        self.path, self.models, self.plugins, self.evidence = path, content["models"], content["plugins"], content["evidence"]
        self.defences = {name: settings or {} for name, settings in (content["defences"] or dict.fromkeys(USUAL)).items()}
        self.budgets, self.seeds = content["budgets"], content["seeds"]
        self.studies = [{"model": model, "budget": budget, "seed": str(seed)}
                        for model, budget, seed in itertools.product(self.models, self.budgets, self.seeds)]
        kinds = {kind: (kind, f"images/{kind}s/*.py") for kind in ("attack", "defence", "model")}
        self.known = registered(kinds, self.plugins, "cupel.images", path)
        for name, given in self.models.items():
            self._check_model(f"{path}: models.{name}", name, given)
        for name, settings in self.defences.items():
            self._check_defence(name, settings)

    def _check_model(self, where: str, name: str, given: Mapping) -> None:
        if not re.fullmatch("[a-z0-9_]+", str(name)) or not isinstance(name, str):
            raise ConfigError(f"{where}: a name is a text of lower-case letters, digits and _; a number stands in quotes")
        try:
            normalisation(given.get("normalize", "none"))
        except ValueError as error:
            raise ConfigError(f"{where}.normalize: {error}") from None
        if "trigger" in given and "target" not in given:
            raise ConfigError(f"{where}: a trigger was given without the label that the attacker wants (target)")
        for key in ("checkpoint", "clean", "measure"):
            if key in given and not Path(given[key]).exists():
                raise ConfigError(f"{where}.{key}: there is nothing at {given[key]}")
        for key in ("arch", "trigger"):
            if ".py:" not in (text := given.get(key, "")):
                continue
            if not python_file(text).is_file():
                raise ConfigError(f"{where}.{key}: there is no file {python_file(text)}")
            try:
                code_digest(python_file(text))
            except ValueError as error:
                raise ConfigError(f"{where}.{key}: {error}") from None
        trigger = given.get("trigger", ".py:")
        if ".py:" not in trigger and trigger not in self.known["attack"]:
            raise ConfigError(f"{where}.trigger: {unknown('attack', trigger, self.known['attack'])}")

    def _check_defence(self, name: str, settings: Mapping) -> None:
        function = name.partition("~")[0]
        if function not in self.known["defence"]:
            raise ConfigError(f"{self.path}: defences: {unknown('defence', function, self.known['defence'])}")
        entry = self.known["defence"][function]
        for key in settings:
            if key not in entry.parameters:
                raise ConfigError(f"{self.path}: defences.{name}: {unknown('setting', key, entry.parameters)}")
        plugin = entry.place.rpartition(":")[0] in self.plugins
        form = (limits.typed(entry.parameters, entry.values) if plugin
                else limits.form("images", "defences", function, entry.parameters, entry.values))
        check_schema({"defences": {name: settings}}, {"properties": {"defences": {"properties": {name: form}}}}, self.path)

    def data(self, model: str) -> list[str]:
        """Files and folders of a model whose content counts."""
        return [self.models[model][key] for key in ("checkpoint", "clean", "measure") if key in self.models[model]]

    def files(self, model: str) -> list[str]:
        """All files and folders that a model is read from."""
        given = self.models[model]
        code = [str(python_file(given[key])) for key in ("arch", "trigger") if ".py:" in given.get(key, "")]
        return [*self.data(model), *code, *self.plugins]

    def study(self, model: str, budget: str, seed: str) -> dict:
        """All that a study depends on, as plain data."""
        return {"given": self.models[model], "spc": None if budget == "all" else int(budget.removeprefix("spc")),
                "seed": int(seed), "evidence": self.evidence, "files": [content(file) for file in self.data(model)]}

    def code(self, model: str, defence: str = "") -> list[str]:
        """Where what is looked up by name, or named by its file, is defined: roots of `cupel.digest.code_digest`."""
        given = self.models[model]
        names = {"defence": defence.partition("~")[0], "attack": given.get("trigger"), "model": given.get("arch")}
        own = [root(given[key]) for key in ("arch", "trigger") if ".py:" in given.get(key, "")]
        return [*own, *(self.known[kind][name].place for kind, name in names.items() if name in self.known[kind])]


def python_file(text: str) -> Path:
    """The file of `file.py:name`."""
    return Path(f"{text.partition('.py:')[0]}.py")


def root(text: str) -> str:
    """What `file.py:name` or `file.py:name(1, width=2)` depends on, as a root of a digest: the definition, or all of the file
    where the name is bound otherwise."""
    file = python_file(text)
    place = f"{file}:{text.partition('.py:')[2].partition('(')[0].strip()}"
    try:
        code_digest(place)
    except ValueError:
        return str(file)
    return place


@functools.cache
def content(path: str) -> str | dict:
    """What counts of a file or a folder, read once a run: of prepared data the same as in the grids of papers, else all."""
    return prepared.content(path) or digest(path)


def opened(study: Mapping, device: str):
    """The `cupel.own.run.Study` of `Grid.study`, and what writes its networks."""
    from cupel.own import run, suspect

    network, options, write = suspect.opened(study["given"])
    return run.Study(*network, **options, spc=study["spc"], seed=study["seed"], device=device), write


def look(study: Mapping, out: Path, device: str) -> None:
    """Measure a network as it was given: `look.json` with its row, evidence and facts, and `reversed.npz`."""
    case, _ = opened(study, device)
    case.check()
    evidence = case.look(study["evidence"])
    write_tensors(out / "reversed.npz", case.reversed)
    write_json(out / "look.json", {"row": case.given, "evidence": evidence, "facts": case.facts()})


def purify(study: Mapping, defence: tuple[str, Mapping], out: Path, device: str) -> None:
    """Run a defence with its settings on a network: `rows/<defence>.json`, checkpoint and history.

    Raises:
        Exception: an error of the machine's; one of the defence's is its result.
    """
    from cupel.own import run

    name, settings = defence
    case, write = opened(study, device)
    case.reversed = read_tensors(out / "reversed.npz")
    try:
        row, _ = case.run(name, settings, out, write)
    except Exception as error:
        row = run.failed(name, error)
    write_json(out / "rows" / f"{name}.json", row)
    shutil.rmtree(out / "work" / name, ignore_errors=True)


def report(out: Path, defences: Mapping[str, Mapping]) -> None:
    """Table and page of a study whose rows are there."""
    import pandas as pd

    from cupel.own.page import write_report

    found = read_json(out / "look.json")
    table = pd.DataFrame([found["row"], *(read_json(out / "rows" / f"{name}.json") for name in defences)])
    write_report(out, table, found["evidence"], read_tensors(out / "reversed.npz"), {**found["facts"], "settings": defences})


def gather(out: Path, studies: Iterable[Mapping]) -> None:
    """One table and one page over studies, by model, budget and seed."""
    import pandas as pd

    from cupel.own.page import metrics_of
    from cupel.reporting.page import write_page

    table = pd.concat(pd.read_csv(out / folder(study) / "results.csv").assign(folder=folder(study), **study)
                      for study in studies)
    table = table[[*(first := ["model", "budget", "seed", "defence"]), *table.columns.drop(first)]]
    write_text(out / "results.csv", table.to_csv(index=False))
    write_page(out / "index.html", "own_grid.html.j2", rows=table.to_dict("records"), metrics=metrics_of(table))


def folder(study: Mapping[str, str]) -> str:
    """Where a study lies in the folder of its grid."""
    return "{model}/{budget}/seed{seed}".format(**study)
