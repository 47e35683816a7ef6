"""From experiment.yaml to cells: which victims and which purified models a paper asks for at a scale.

Plain Python over plain dicts: the workflow uses it to plan, a notebook may use it to look around.
"""

from collections.abc import Iterable
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator

from cupel.registry import definitions, signatures, unknown

LIBRARY = Path(__file__).parent
PAPERS = LIBRARY.parent / "papers"
SCHEMAS = LIBRARY.parent / "schemas"
#: the safe loader, in C where PyYAML was built with it: ten times faster, and the files are read at every start
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


#: kinds of papers: what is attacked and defended; each has its own form of experiment.yaml and its own rules
FAMILIES = ("image", "interpretability", "language", "multimodal")


class ConfigError(ValueError):
    """A setting is wrong: the text names file, key, what was found and what is allowed."""


def read_yaml(path: str | Path) -> dict:
    """A YAML file as plain data.

    Raises:
        ConfigError: not readable as YAML.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), LOADER) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None


def _sentence(error, file) -> str:
    key = ".".join(str(part) for part in error.absolute_path) or "(top level)"
    found = error.instance
    if error.validator == "additionalProperties":
        allowed = sorted(error.schema.get("properties", {}))
        extra = sorted(set(found) - set(allowed))
        return "; ".join(f"{file}: {'' if key == '(top level)' else key + '.'}{unknown('key', name, allowed)}"
                         for name in extra)
    if error.validator == "enum":
        return f"{file}: {key}: {found!r} is not allowed; allowed are {', '.join(map(str, error.validator_value))}"
    if error.validator == "type":
        kinds = error.validator_value
        return f"{file}: {key}: {found!r} should be of type {kinds if isinstance(kinds, str) else ' or '.join(kinds)}"
    if error.validator == "required":
        return f"{file}: {key}: {error.message}"
    if error.validator in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        words = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
        return f"{file}: {key}: {found!r} is out of range: it must be {words[error.validator]} {error.validator_value}"
    if error.validator in ("anyOf", "oneOf"):
        options = error.schema[error.validator]
        allowed = [str(option.get("enum") or option.get("type") or option.get("const")) for option in options]
        return f"{file}: {key}: {found!r} is not allowed; allowed are {', '.join(allowed)}"
    return f"{file}: {key}: {error.message}"


def check_schema(content: dict, schema: str, file: str | Path) -> None:
    """Compare a setting file with its JSON schema (`schemas/<schema>.schema.yaml`).

    Raises:
        ConfigError: one line per mistake.
    """
    validator = Draft202012Validator(read_yaml(SCHEMAS / f"{schema}.schema.yaml"))
    errors = sorted(validator.iter_errors(content), key=lambda e: str(list(e.absolute_path)))
    if errors:
        raise ConfigError("\n".join(_sentence(error, file) for error in errors))


def typed(content, schema: dict):
    """Content with strings turned into what the schema asks for, where it asks for a number or a truth value.

    Snakemake's command line leaves nested values, as in `--config seeds=[0,1]`, as strings.
    """
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(content, dict):
        known = schema.get("properties", {})
        return {key: typed(value, known.get(key, {})) for key, value in content.items()}
    if isinstance(content, list):
        return [typed(value, schema.get("items", {})) for value in content]
    if isinstance(content, str) and {"integer", "number", "boolean"} & set(kinds):
        try:
            value = yaml.safe_load(content)
        except yaml.YAMLError:
            return content
        return value if isinstance(value, (int, float)) or (value is None and "null" in kinds) else content
    return content


def resolve(entry: dict, key: str, dataset: str, scale: str) -> dict:
    """Settings of an entry: its `key`, overlaid by what it says for the data set, then for the scale."""
    settings = dict(entry.get(key) or {})
    settings.update((entry.get("datasets") or {}).get(dataset) or {})
    settings.update((entry.get("scales") or {}).get(scale) or {})
    return settings


class Grid:
    """Everything that the experiment files of the chosen papers say, at one scale.

    The cells are those of the papers on image classifiers; papers of other families are checked and kept in `experiments`.

    Args:
        papers: keys, folders under workflow/papers.
        scale: name of the scale.
        seeds: instead of those of the scale; None keeps them.
        plugins: files that register more attacks and defences.
        jobs: `cell` or `victim`, instead of what the scale says; None keeps it. See `blocks`.
        folder: of the papers.

    Raises:
        ConfigError: anything that would fail later in a job and can be known now.
    """

    SECTIONS = ("recipes", "attacks", "defences", "budgets")
    #: what tells one cell from another
    IDENTITY = ("stage", "dataset", "model", "recipe", "attack", "rate", "seed", "defence", "budget")

    def __init__(self, papers: Iterable[str], scale: str, seeds: list[int] | None = None,
                 plugins: Iterable[str] = (), jobs: str | None = None, folder: str | Path = PAPERS):
        self.scale, self.jobs, self.folder = scale, jobs, Path(folder)
        self.known = {paper.name: paper / "experiment.yaml" for paper in sorted(self.folder.iterdir())
                      if (paper / "experiment.yaml").is_file()}
        self.papers = list(papers)
        for paper in self.papers:
            if paper not in self.known:
                raise ConfigError(f"config.yaml: papers: {unknown('paper', paper, self.known)}")
        missing = [str(path) for path in plugins if not Path(path).is_file()]
        if missing:
            raise ConfigError(f"config.yaml: plugins: no such file: {', '.join(missing)}")
        self.plugins = [str(path) for path in plugins]
        self.experiments = {}
        self.entries = {section: {} for section in self.SECTIONS}
        origin = {}
        for paper, file in self.known.items():
            content = read_yaml(file)
            family = content.get("family", "image")
            if family not in FAMILIES:
                raise ConfigError(f"{file}: family: {unknown('family', family, FAMILIES)}")
            check_schema(content, "experiment" if family == "image" else f"experiment_{family}", file)
            self.experiments[paper] = content
            if family != "image":  # its own module turns it into cells
                continue
            for section in self.SECTIONS:
                for name, entry in (content.get(section) or {}).items():
                    # a name means the same in every paper: two definitions would share results by accident
                    if name in self.entries[section] and self.entries[section][name] != entry:
                        raise ConfigError(f"{file}: {section}.{name} is defined otherwise in "
                                          f"{origin[section, name]}: give one of them another name")
                    self.entries[section][name] = entry
                    origin[section, name] = file
        self.signatures, self.definitions = {}, {}
        for kind, package in (("attack", "images/attacks"), ("defence", "images/defences"), ("model", "images/models")):
            files = [*sorted((LIBRARY / package).glob("*.py")), *map(Path, self.plugins)]
            parameters, self.definitions[kind] = signatures(kind, files), definitions(kind, files)
            self.signatures[kind] = {name: (path, parameters[name]) for path in files for name in signatures(kind, [path])}
        self._check_functions()
        self.plans = {paper: self._plan(paper, seeds) for paper in self.papers}
        self._cells: dict[tuple, list[dict]] = {}

    def _check_functions(self) -> None:
        common = {"attack": {"smaller"}, "defence": set()}
        for section, kind, key in (("attacks", "attack", "parameters"), ("defences", "defence", "hyperparameters")):
            for name, entry in self.entries[section].items():
                function = entry.get("function", name.partition("~")[0])
                where = f"experiment.yaml: {section}.{name}"
                if function in ("none", "clean"):
                    continue
                if function not in self.signatures[kind]:
                    raise ConfigError(f"{where}.function: {unknown(kind, function, self.signatures[kind])}")
                allowed = self.signatures[kind][function][1] | common[kind]
                places = [(entry.get(key) or {}, key)]
                places += [((entry.get(over) or {}).get(case) or {}, f"{over}.{case}")
                           for over in ("datasets", "scales") for case in (entry.get(over) or {})]
                for settings, place in places:
                    for parameter in settings:
                        if parameter not in allowed:
                            what = unknown(f"parameter of {kind} {function}", parameter, allowed)
                            raise ConfigError(f"{where}.{place}: {what}")

    def _plan(self, paper: str, seeds: list[int] | None) -> list[dict]:
        """The cells of a paper: victims first, each followed by its purified models."""
        experiment, file = self.experiments[paper], self.known[paper]
        scales = experiment["scales"]
        if self.scale not in scales or self.family(paper) != "image":
            return []
        cells = []
        for number, block in enumerate(scales[self.scale]["blocks"]):
            where = f"{file}: scales.{self.scale}.blocks.{number}"
            for section in ("attacks", "defences", "budgets"):
                for name in block.get(section, []):
                    if (section, name) == ("attacks", "clean"):  # clean training is no attack, it is the twin of all
                        continue
                    if name not in self.entries[section] and not (section != "budgets" and self._plugin(section, name)):
                        raise ConfigError(f"{where}.{section}: {unknown(section[:-1], name, self.entries[section])}")
            if block["recipe"] not in self.entries["recipes"]:
                raise ConfigError(f"{where}.recipe: {unknown('recipe', block['recipe'], self.entries['recipes'])}")
            for name in block["models"]:
                if name not in self.definitions["model"]:
                    raise ConfigError(f"{where}.models: {unknown('model', name, self.definitions['model'])}")
            for dataset in block["datasets"]:
                for model in block["models"]:
                    for seed in seeds or block.get("seeds") or scales[self.scale]["seeds"]:
                        for attack in block["attacks"]:
                            for rate in block["rates"] if attack != "clean" else [0]:
                                victim = {"paper": paper, "dataset": dataset, "model": model,
                                          "recipe": block["recipe"], "attack": attack, "rate": f"{rate:g}",
                                          "seed": str(seed)}
                                cells.append({**victim, "stage": "victim"})
                                if attack == "clean":
                                    continue
                                cells += [{**victim, "stage": "purified", "defence": defence, "budget": budget}
                                          for budget in block.get("budgets", [])
                                          for defence in block.get("defences", [])]
        return cells

    def family(self, paper: str) -> str:
        """What kind of paper it is, one of `FAMILIES`."""
        return self.experiments[paper].get("family", "image")

    def papers_of(self, family: str) -> list[str]:
        """The chosen papers of a family."""
        return [paper for paper in self.papers if self.family(paper) == family]

    def _plugin(self, section: str, name: str) -> bool:
        kind = section[:-1]
        return name in self.signatures[kind] and str(self.signatures[kind][name][0]) in self.plugins

    def cells(self, stage: str | None = None, paper: str | None = None) -> list[dict]:
        """Cells of the chosen papers, each once although two papers may ask for it."""
        if (stage, paper) not in self._cells:  # the workflow asks a hundred times
            found = {}
            for cell in (cell for key in self.papers if paper in (None, key) for cell in self.plans[key]):
                if stage in (None, cell["stage"]):
                    found.setdefault(tuple(cell.get(key) for key in self.IDENTITY), cell)
            self._cells[stage, paper] = list(found.values())
        return list(self._cells[stage, paper])

    def blocks(self) -> dict[tuple, list[dict]]:
        """Purified cells that one job does together: those of a victim, where the scale or `jobs` says `victim`.

        Returns:
            (paper, dataset, model, recipe, attack, rate, seed) to cells. A cell that two papers share belongs to the one
            that config.yaml names first.
        """
        blocks = {}
        for cell in self.cells("purified"):
            if (self.jobs or self.experiments[cell["paper"]]["scales"][self.scale].get("jobs")) == "victim":
                key = tuple(cell[k] for k in ("paper", "dataset", "model", "recipe", "attack", "rate", "seed"))
                blocks.setdefault(key, []).append(cell)
        return blocks

    def _entry(self, section: str, name: str) -> dict:
        if name in self.entries[section]:
            return self.entries[section][name]
        if section != "recipes" and self._plugin(section, name):
            return {}
        raise ConfigError(f"{unknown(section[:-1], name, self.entries[section])} (in the experiment.yaml files)")

    def recipe(self, name: str, dataset: str) -> dict:
        """Settings of a recipe for a data set at this scale, one flat level of sections."""
        entry = self._entry("recipes", name)
        settings = {}
        for layer in (entry.get("settings"), (entry.get("datasets") or {}).get(dataset),
                      (entry.get("scales") or {}).get(self.scale)):
            for section, values in (layer or {}).items():
                settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
        return settings

    def attack(self, name: str, dataset: str) -> dict:
        """Function and parameters of an attack for a data set at this scale."""
        entry = self._entry("attacks", name)
        return {"function": entry.get("function", name.partition("~")[0]),
                "parameters": resolve(entry, "parameters", dataset, self.scale)}

    def attack_training(self, name: str) -> dict:
        """What an attack changes in the training of any recipe at this scale."""
        changes = self._entry("attacks", name).get("training") or {}
        return {**(changes.get("all") or {}), **(changes.get(self.scale) or {})}

    def defence(self, name: str, dataset: str) -> dict:
        """Function and hyperparameters of a defence for a data set at this scale."""
        entry = self._entry("defences", name)
        return {"function": entry.get("function", name.partition("~")[0]),
                "hyperparameters": resolve(entry, "hyperparameters", dataset, self.scale)}

    def budget(self, name: str) -> dict:
        """Settings of a clean budget."""
        return dict(self._entry("budgets", name))

    def code(self, kind: str, function: str) -> Path | None:
        """The file that defines an attack or a defence."""
        return self.signatures[kind][function][0] if function in self.signatures[kind] else None

    def file(self, paper: str, name: str) -> Path:
        """A file in a paper's folder."""
        return self.folder / paper / name
