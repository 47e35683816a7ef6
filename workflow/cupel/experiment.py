"""From the experiment.yaml of papers to cells: what is trained, purified and measured at a scale. One planner for all families.

Plain Python over plain dicts: the workflow uses it to plan, a notebook may use it to look around. `Grid` reads the files;
a `Family` knows what the entries of its papers mean. Each has a child in `cupel/<family>/experiment.py`.

An entry of any section holds `settings`, and may overlay them for a data set, a model and a scale, in this order:

    fst: {settings: {alpha: 0.2, lr: 0.01}, datasets: {gtsrb: {alpha: 0.1}}, scales: {smoke: {epochs: 1}}}
"""

import functools
import importlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cupel import limits
from cupel.paths import Paths
from cupel.registry import Entry, entries, unknown
from cupel.settings import LIBRARY, PAPERS, ConfigError, check_schema, read_yaml, schema

#: kinds of papers: what is attacked and defended
FAMILIES = ("images", "robust", "text", "vision_language")
SCALES = ("smoke", "demo", "desk", "bench", "paper")
#: what an entry may overlay its settings for, by the key of a cell
OVERLAYS = {"dataset": "datasets", "model": "models", "scale": "scales"}


@functools.cache
def schema_of(family: str) -> dict:
    """JSON schema of the experiment files of a family: what all families share, with the sections of this one."""
    common, own = schema("experiment"), schema(family)
    for section, entry in own["sections"].items():
        settings = entry.get("settings")
        by_name = {"type": "object", "additionalProperties": settings}
        forms = {"settings": settings, "datasets": by_name, "models": by_name,
                 "scales": {"type": "object", "additionalProperties": False, "properties": dict.fromkeys(SCALES, settings)}}
        properties = {**common["$defs"]["entry"], **(forms if settings else {}), **entry.get("properties", {})}
        common["properties"][section] = {
            "type": "object", "propertyNames": {"pattern": entry.get("names", "^[a-z0-9_]+(~[a-z0-9_]+)?$")},
            "additionalProperties": {"type": "object", "additionalProperties": False, "properties": properties,
                                     "required": ["source", *entry.get("required", [])]}}
    scale = common["$defs"]["scale"]
    scale["properties"] |= own.get("scale", {})
    scale["properties"]["blocks"]["items"] |= {"properties": {**common["$defs"]["block"], **own["block"]["properties"]},
                                               "required": ["datasets", "models", "recipe", *own["block"]["required"]]}
    common["properties"]["scales"] = {"type": "object", "additionalProperties": False,
                                      "properties": dict.fromkeys(SCALES, scale)}
    common["properties"] |= own.get("properties", {})
    common["$defs"] = own.get("$defs", {})
    return common


def overlaid(entry: Mapping, **case: str) -> dict:
    """Settings of an entry for a case (`dataset`, `model`, `scale`); sections are merged, all else is replaced.

    Values are those of the entry, not copies: planning asks for thousands, and nobody changes them.
    """
    settings: dict = {}
    layers = [entry.get("settings"), *((entry.get(over) or {}).get(case.get(key)) for key, over in OVERLAYS.items())]
    for layer in layers:
        for key, value in (layer or {}).items():
            both = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = {**settings[key], **value} if both else value
    return settings


def layers(entry: Mapping) -> Iterator[tuple[str, dict]]:
    """Every place of an entry that holds settings, with its key: for checks."""
    yield "settings", entry.get("settings") or {}
    for over in OVERLAYS.values():
        for case, settings in (entry.get(over) or {}).items():
            yield f"{over}.{case}", settings or {}


def registered(kinds: Mapping[str, tuple[str, str]], plugins: list[str], package: str,
               file: str | Path) -> dict[str, dict[str, Entry]]:
    """What the library and plugins register: kind -> registered name -> what its source says of it.

    Args:
        kinds: as `Family.REGISTERED`.
        package: whose decorators they are.
        file: that names the plugins.

    Raises:
        ConfigError: a plugin is missing, is not Python, or takes the name of another.
    """
    if missing := [plugin for plugin in plugins if not Path(plugin).is_file()]:
        raise ConfigError(f"{file}: plugins: no such file: {', '.join(missing)}")
    try:
        return {kind: entries(decorator, [*sorted(LIBRARY.glob(place)), *plugins], package)
                for kind, (decorator, place) in kinds.items()}
    except ValueError as error:
        raise ConfigError(f"{file}: plugins: {error}") from None


class Family:
    """What the papers of one family ask for at one scale.

    Args:
        experiments: contents of the experiment files of all papers of the family that are there, by key, checked against
            the schema; and under `shared/<family>` what several of them use.
        papers: those that are chosen.
        scale: name.
        seeds: instead of those of the scale; None keeps them.
        plugins: files of the user that register more entries.
        mirror: folder of the user with raw files, which settings may point into.
        folder: of the papers, for messages.

    Attributes:
        entries: section -> name -> entry, of all papers: a name means the same in each.
        registered, parameters: kind -> registered name -> what its source says of it, and what it can be given.
        cells: of the chosen papers, in the order of their files. Dicts whose values are text, with paper, family, stage and
            what the stage's path names.

    Raises:
        ConfigError: anything that would fail later in a job and can be known now.
    """

    #: name, one of `FAMILIES`
    NAME: str
    #: sections of the experiment file, and by which key a block names their entries
    SECTIONS: Mapping[str, str]
    #: what is looked up by name: kind -> its decorator, and where in the library it stands
    REGISTERED: Mapping[str, tuple[str, str]] = {}
    #: files of cells that reports read, by kind: of which stage (None: of all), and their name
    REPORT_FILES: Mapping[str, tuple[str | None, str]] = {}
    #: the family whose prepared data it uses; its own
    DATA = ""
    #: what a recipe must set, by section
    NEEDED: Mapping[str, tuple[str, ...]] = {}
    #: stage of what is trained first, and is the victim of defences
    FIRST = "victim"

    def __init__(self, experiments: Mapping[str, dict], papers: Iterable[str], scale: str, *, seeds: list[int] | None = None,
                 plugins: Iterable[str] = (), mirror: str | None = None, folder: Path = PAPERS):
        self.experiments, self.papers, self.scale, self.folder = experiments, list(papers), scale, folder
        self.seeds, self.plugins, self.mirror = seeds, list(map(str, plugins)), mirror
        self.entries: dict[str, dict] = {section: {} for section in self.SECTIONS}
        self.origin: dict[tuple[str, str], Path] = {}
        for paper, content in experiments.items():
            for section in self.SECTIONS:
                for name, entry in (content.get(section) or {}).items():
                    # two definitions of one name would share results by accident
                    if self.entries[section].setdefault(name, entry) != entry:
                        raise ConfigError(f"{self.file(paper)}: {section}.{name} is defined otherwise in "
                                          f"{self.origin[section, name]}: give one of them another name")
                    self.origin.setdefault((section, name), self.file(paper))
        self.registered = registered(self.REGISTERED, self.plugins, f"cupel.{self.NAME}", "config.yaml")
        self.parameters = {kind: {name: set(entry.parameters) for name, entry in known.items()}
                           for kind, known in self.registered.items()}
        self.check()
        self.cells = [cell for paper in self.papers for cell in self._cells(paper)]

    def file(self, paper: str) -> Path:
        """The file in which a paper says what is run."""
        return self.folder / (f"{paper}.yaml" if "/" in paper else f"{paper}/experiment.yaml")

    def wrong(self, section: str, name: str, where: str, what: str) -> ConfigError:
        """The error for an entry: the file that has it, the key, what is wrong."""
        return ConfigError(f"{self.origin[section, name]}: {section}.{name}{where and '.' + where}: {what}")

    def known(self, section: str, name: str, where: str, kind: str, given: Iterable[str], *,
              allowed: Iterable[str]) -> None:
        """Names that an entry gives at a place are among those allowed; `kind` says what they are.

        Raises:
            ConfigError: one is not.
        """
        for key in given:
            if key not in allowed:
                raise self.wrong(section, name, where, unknown(kind, key, allowed))

    def check(self) -> None:
        """What the schema cannot say of entries.

        Raises:
            ConfigError: one of them is wrong.
        """

    def kind(self, section: str, name: str) -> str:
        """Under which kind what an entry runs is registered."""
        return section.removesuffix("s")

    def check_functions(self, *sections: str) -> None:
        """What entries run is registered, and has their settings, in every overlay: with values of the types of the
        defaults, within the limits of the schema.

        Raises:
            ConfigError: one of them is wrong.
        """
        for section in sections:
            for name, entry in self.entries[section].items():
                kind, function = self.kind(section, name), self.function(section, name)
                self.known(section, name, "function", kind, [function], allowed=self.parameters[kind])
                names, source = self.parameters[kind][function], self.registered[kind][function]
                for place, settings in layers(entry):
                    self.known(section, name, place, f"setting of {function}", settings, allowed=names)
                plugin = source.place.rpartition(":")[0] in self.plugins
                wanted = (limits.typed(names, source.values) if plugin
                          else limits.form(self.NAME, section, function, names, source.values))
                overlays = {over: {"additionalProperties": wanted} for over in OVERLAYS.values()}
                form = {"properties": {section: {"properties": {name: {"properties": {"settings": wanted, **overlays}}}}}}
                check_schema({section: {name: entry}}, form, self.origin.get((section, name), "plugins"))

    def check_block(self, where: str, block: Mapping) -> None:
        """What the schema cannot say of a block beside that its names are known.

        Raises:
            ConfigError: it asks for the impossible.
        """
        if "budgets" in self.SECTIONS and block.get("defences") and not block.get("budgets"):
            raise ConfigError(f"{where}.budgets: defences need at least one budget of clean samples")

    def check_needed(self, cell: Mapping, where: str) -> dict:
        """Settings of a cell's recipe, which has what every job reads (`NEEDED`).

        Raises:
            ConfigError: it has not.
        """
        settings = self.settings("recipes", cell["recipe"], cell)
        for section, keys in self.NEEDED.items():
            for key in keys:
                if key not in settings.get(section, {}):
                    raise ConfigError(f"{where}: recipe {cell['recipe']} on {cell['dataset']} at scale {self.scale}: "
                                      f"{section}.{key} is not set")
        return settings

    def _cells(self, paper: str) -> list[dict]:
        scale, found = self.experiments[paper]["scales"][self.scale], {}
        for number, block in enumerate(scale["blocks"]):
            where = f"{self.file(paper)}: scales.{self.scale}.blocks.{number}"
            for section, key in self.SECTIONS.items():
                names = block.get(key, [])
                for name in [names] if isinstance(names, str) else names:
                    self.find(section, name, f"{where}.{key}")
            self.check_block(where, block)
            for cell in self.expand({**block, "seeds": self.seeds or block.get("seeds") or scale["seeds"]}, where):
                cell = {"paper": paper, "family": self.NAME, **cell}
                found.setdefault(tuple(cell.items()), cell)  # two blocks may share cells
        return list(found.values())

    def expand(self, block: Mapping, where: str) -> Iterator[dict]:
        """Cells of a block: victims, each followed by what is made of it."""
        keys = ("dataset", "model", "seed", "attack", "rate")
        for dataset, model, seed, attack, rate in itertools.product(*(block[f"{key}s"] for key in keys)):
            victim = {"stage": self.FIRST, "dataset": dataset, "model": model, "recipe": block["recipe"], "attack": attack,
                      "rate": f"{rate:g}", "seed": str(seed)}
            yield from self.follow(victim, block, where)

    def follow(self, victim: dict, block: Mapping, where: str) -> Iterator[dict]:
        """A victim, and every defence on every budget."""
        yield victim
        for budget, defence in itertools.product(block.get("budgets", []), block.get("defences", [])):
            yield {**victim, "stage": "purified", "defence": defence, "budget": budget}

    def find(self, section: str, name: str, where: str = "asked for by path") -> dict:
        """An entry.

        Raises:
            ConfigError: there is none of this name.
        """
        if name not in self.entries[section]:
            raise ConfigError(f"{where}: {unknown(section.removesuffix('s'), name, self.entries[section])}")
        return self.entries[section][name]

    def function(self, section: str, name: str) -> str:
        """Registered name of what an entry runs; without one, its own name before `~`."""
        return self.find(section, name).get("function", name.partition("~")[0])

    def settings(self, section: str, name: str, cell: Mapping = {}) -> dict:
        """Settings of an entry for the data set and model of a cell, at this scale."""
        case = {key: cell.get(key) for key in ("dataset", "model")}
        return overlaid(self.find(section, name), **case, scale=self.scale)

    def entry(self, kind: str, name: str) -> Entry | None:
        """What the source says of what an attack, a defence or a network runs; None for clean training."""
        section = f"{kind}s"
        if section not in self.entries:
            return self.registered[kind].get(name)
        return self.registered[self.kind(section, name)].get(self.function(section, name))

    def code(self, kind: str, name: str) -> str | None:
        """Where an attack, a defence or a network is defined: a root of `cupel.digest.code_digest`, None for clean training."""
        entry = self.entry(kind, name)
        return entry and entry.place

    def labels(self, section: str) -> dict[str, str]:
        """Names for people, in the order of the files."""
        return {name: entry.get("label", name) for name, entry in self.entries[section].items()}

    def used(self, key: str, paper: str | None = None) -> list[str]:
        """Distinct values of a key of the cells, in the order in which they come first."""
        return list(dict.fromkeys(cell[key] for cell in self.cells if key in cell and paper in (None, cell["paper"])))

    def report_labels(self, paper: str) -> dict[str, dict[str, str]]:
        """Names for people that the report of a paper uses, by section."""
        return {section: self.labels(section) for section in ("models", "attacks", "defences") if section in self.entries}

    def facts(self, paper: str, paths: Paths) -> dict:
        """What the report of a paper must know beside the tidy table."""
        return {}

    def report_files(self, paper: str, paths: Paths) -> dict[str, list[str]]:
        """Files that the report of a paper reads beside the tidy table, by kind."""
        cells = [cell for cell in self.cells if cell["paper"] == paper]
        return {kind: list(dict.fromkeys(f"{paths.cell(cell)}/{name}" for cell in cells if stage in (None, cell["stage"])))
                for kind, (stage, name) in self.REPORT_FILES.items()}

    def data(self, paper: str | None = None) -> list[str]:
        """Prepared data that the cells need, as folders below that of all data."""
        return [f"{self.DATA or self.NAME}/{name}" for name in sorted(self.used("dataset", paper))]


class Grid:
    """Everything that the chosen papers ask for at one scale.

    Args:
        papers: keys, folders under workflow/papers.
        scale: name of the scale.
        seeds: instead of those of the scale; None keeps them.
        plugins: files that register more attacks and defences.
        jobs: `cell` or `victim`, instead of what the scale says; None keeps it. See `blocks`.
        mirror: folder of the user with raw files.
        folder: of the papers.

    Raises:
        ConfigError: anything that would fail later in a job and can be known now.
    """

    def __init__(self, papers: Iterable[str], scale: str, seeds: list[int] | None = None, plugins: Iterable[str] = (),
                 *, jobs: str | None = None, mirror: str | None = None, folder: str | Path = PAPERS):
        self.papers, self.scale, self.jobs, self.folder = list(papers), scale, jobs, Path(folder)
        known = {file.parent.name: file for file in sorted(self.folder.glob("*/experiment.yaml"))}
        for paper in self.papers:
            if paper not in known:
                raise ConfigError(f"config.yaml: papers: {unknown('paper', paper, known)}")
        shared = {f"shared/{family}": self.folder / "shared" / f"{family}.yaml" for family in FAMILIES}
        files = {paper: file for paper, file in {**shared, **known}.items() if file.is_file()}
        self.experiments = {paper: _experiment(file, file.stat().st_mtime_ns) for paper, file in files.items()}
        for paper in self.papers:
            if scale not in (scales := self.experiments[paper]["scales"]):
                others = [other for other in known if scale in self.experiments[other]["scales"]]
                raise ConfigError(f"scale: {paper} has no scale {scale!r}; it has {', '.join(scales)}. "
                                  f"Scale {scale} is there for: {', '.join(others)}")
        self.families: dict[str, Family] = {}
        for name in FAMILIES:
            contents = {key: content for key, content in self.experiments.items() if content["family"] == name}
            module = importlib.import_module(f"cupel.{name}.experiment")
            self.families[name] = module.Experiments(contents, self.papers_of(name), scale, seeds=seeds, plugins=plugins,
                                                     mirror=mirror, folder=self.folder)
        self._cells: dict[tuple, list[dict]] = {}

    def papers_of(self, family: str) -> list[str]:
        """The chosen papers of a family."""
        return [paper for paper in self.papers if self.experiments[paper]["family"] == family]

    def family(self, paper: str) -> Family:
        """The family of a paper."""
        return self.families[self.experiments[paper]["family"]]

    def cells(self, stage: str | None = None, paper: str | None = None, family: str | None = None) -> list[dict]:
        """Cells of the chosen papers, each once although two papers may ask for it."""
        if (stage, paper, family) not in self._cells:  # the workflow asks a hundred times
            found: dict[tuple, dict] = {}
            for cell in itertools.chain.from_iterable(map(self.of_paper, self.papers if paper is None else [paper])):
                if stage in (None, cell["stage"]) and family in (None, cell["family"]):
                    found.setdefault(tuple(value for name, value in cell.items() if name != "paper"), cell)
            self._cells[stage, paper, family] = list(found.values())
        return list(self._cells[stage, paper, family])

    def of_paper(self, paper: str) -> list[dict]:
        """Cells of a paper: one that two papers share belongs to both."""
        return [cell for cell in self.family(paper).cells if cell["paper"] == paper]

    def blocks(self) -> list[list[dict]]:
        """Purified image classifiers that one job does together: those of a victim, where the scale or `jobs` says `victim`.

        A cell that two papers share belongs to the one that config.yaml names first.
        """
        found: dict[tuple, list[dict]] = {}
        for cell in self.cells("purified", family="images"):
            if (self.jobs or self.experiments[cell["paper"]]["scales"][self.scale].get("jobs")) == "victim":
                key = tuple(cell[k] for k in ("paper", "dataset", "model", "recipe", "attack", "rate", "seed"))
                found.setdefault(key, []).append(cell)
        return list(found.values())

    def claims(self, paper: str) -> dict:
        """The content of a paper's claims.yaml, its `claims` and perhaps a `gate`; no claims where it has none.

        Raises:
            ConfigError: the file does not fit its schema.
        """
        file = self.folder / paper / "claims.yaml"
        if not file.is_file():
            return {"claims": []}
        content = read_yaml(file)
        check_schema(content, schema("claims"), file)
        return content

    def report_key(self, paper: str) -> str:
        """The paper whose report.py draws this one."""
        return self.experiments[paper].get("report", paper)

    def gate(self, paper: str) -> Mapping[str, float]:
        """Bounds of a valid victim, of a paper's claims or those of the paper whose report it has; empty where neither has its
        own, and `cupel.evaluation.settings.GATE` counts."""
        return self.claims(paper).get("gate") or self.claims(self.report_key(paper)).get("gate", {})

    def file(self, paper: str, name: str) -> Path:
        """A file in a paper's folder."""
        return self.folder / paper / name


@functools.cache
def _experiment(file: Path, changed: int) -> dict:
    """Content of an experiment file, checked against the schema of its family; read again when its time has changed."""
    content = read_yaml(file)
    family = content.get("family")
    if family not in FAMILIES:
        raise ConfigError(f"{file}: family: {unknown('family', str(family), FAMILIES)}")
    form = schema_of(family)
    check_schema(content, {**form, "required": ["family"]} if file.parent.name == "shared" else form, file)
    return content
