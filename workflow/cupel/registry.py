"""What is found by name, plugins among it, and a check of parameters that imports nothing heavy.

A function or class enters a registry by decorator, in a file of the library or of the user:

    @attack("mine")                 @defence("mine")
    class Mine: ...                 def mine(victim, clean, rng, *, lr=0.01): ...
"""

import ast
import contextlib
import difflib
import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cupel.digest import imports_of, read_python


class Registry(dict):
    """A dict from name to class or function, filled by its decorator from the modules of a package, or from one module."""

    def __init__(self, kind: str, package: str):
        super().__init__()
        self.kind, self.package = kind, package

    def __call__(self, name: str) -> Callable:
        """Decorator: register under `name`.

        Raises:
            ValueError: the name is taken by another file.
        """
        def register(entry):
            if name in self and self[name].__module__ != entry.__module__:
                files = f"{self[name].__module__} and in {entry.__module__}"
                raise ValueError(f"{self.kind} {name!r} is defined in {files}")
            self[name] = entry
            return entry

        return register

    def fill(self) -> "Registry":
        """Import every module of the package, so that the registry is complete."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            importlib.import_module(f"{self.package}.{module.name}")
        return self

    def find(self, name: str):
        """The entry `name`.

        Raises:
            ValueError: unknown; the text lists the known names.
        """
        if name not in self and name.isidentifier():
            # most entries live in a module of their own name: the others, and their imports, are then not needed
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(f"{self.package}.{name}")
        if name not in self:
            self.fill()
        one_of(self.kind, name, self)
        return self[name]

    def settings(self, name: str, given: dict) -> dict:
        """All keyword arguments of the function `name`: those given, the others at their defaults.

        Raises:
            ValueError: unknown name, or an argument that the function does not have.
        """
        defaults = self.find(name).__kwdefaults__ or {}
        for key in given:
            one_of(f"parameter of {self.kind} {name}", key, defaults)
        return defaults | given


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known; the name that may be meant comes first, for lists are long and may be cut."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    names = f"known are {', '.join(known)}" if known else "none is known"
    return f"unknown {kind} {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "") + f": {names}"


def one_of(kind: str, name: str, known: Iterable[str]) -> None:
    """Check that a name is known; `kind` says what it names.

    Raises:
        ValueError: it is not; the text lists the known names.
    """
    if name not in known:
        raise ValueError(unknown(kind, name, known))


def module(file: str | Path, name: str = "") -> ModuleType:
    """A Python file as a module, executed; Python knows it by `name` (the file's without one): dataclasses look theirs up."""
    spec = importlib.util.spec_from_file_location(name or Path(file).stem, file)
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Execute the user's plugin files, which register what is theirs, and may import files beside them.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: one cannot be executed; the text names it.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"plugin {path} does not exist (config.yaml, key plugins)")
        if (folder := str(path.resolve().parent)) not in sys.path:
            sys.path.append(folder)
        try:
            module(path, f"cupel_plugin_{path.stem}")
        except Exception as error:
            raise ImportError(f"plugin {path} cannot be executed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Entry:
    """What is known of a registered class or function from its source."""

    place: str  # `<file>:<definition>`, a root of `cupel.digest.code_digest`
    parameters: frozenset[str]  # names of what it can be given
    values: dict[str, Any]  # what it says by a literal: defaults of parameters, constants of a class


def entries(kind: str, files: Iterable[str | Path], package: str = "cupel") -> dict[str, Entry]:
    """What a package's decorator `kind` (`attack`, `defence`, ...) registers in `files`, by name.

    A file may import the decorators of several families, or their modules, under names of its own. Fields of base classes count
    where the base is defined in `files` too.

    Read from the syntax tree: configuration is checked in milliseconds, before any library is imported.

    Raises:
        ValueError: a file is not Python, a name cannot be read, or two files register the same.
    """
    files, found = list(files), {}
    nodes = (node for file in files for node in read_python(file, _parsed).body)
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    for name, file, node in _registered(kind, files, package):
        if name in found:
            raise ValueError(f"{kind} {name!r} is defined in {found[name].place.rpartition(':')[0]} and in {file}: "
                             "give one of them another name")
        fields, values = _members(node, classes) if isinstance(node, ast.ClassDef) else _arguments(node)
        found[name] = Entry(f"{file}:{node.name}", frozenset(fields - {"tensors"}), values)
    return found


def _arguments(node: ast.FunctionDef) -> tuple[set[str], dict[str, Any]]:
    """Keyword-only arguments, and the defaults that are literals."""
    values = {}
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        with contextlib.suppress(ValueError, TypeError):
            values[argument.arg] = ast.literal_eval(default)
    return {argument.arg for argument in node.args.kwonlyargs}, values


def _members(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> tuple[set[str], dict[str, Any]]:
    """Fields of a dataclass, and what it says by literals, with those of its bases."""
    fields, values = set(), {}
    for base in reversed(node.bases):
        if getattr(base, "id", None) in classes:
            inherited = _members(classes[base.id], classes)
            fields, values = fields | inherited[0], values | inherited[1]
    for item in node.body:
        target = item.target if isinstance(item, ast.AnnAssign) else item.targets[0] if isinstance(item, ast.Assign) else None
        if isinstance(target, ast.Name):
            if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
                fields.add(target.id)
            with contextlib.suppress(ValueError, TypeError):
                values[target.id] = ast.literal_eval(item.value)
    return fields, values


def _registered(kind: str, files: Iterable[str | Path],
                package: str) -> Iterator[tuple[str, str | Path, ast.ClassDef | ast.FunctionDef]]:
    for file in files:
        imported, texts = {}, {}
        # in their order: one name may stand for the decorators of two families in turn
        for node in read_python(file, _parsed).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported |= imports_of(node)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, value = node.targets[0].id, getattr(node.value, "value", None)
                imported |= {name: (package, name)} if name == kind else {}
                texts |= {name: value} if isinstance(value, str) else {}
            for mark in getattr(node, "decorator_list", []):
                if not isinstance(mark, ast.Call):
                    continue
                first, *rest = ast.unparse(mark.func).split(".")
                full = ".".join((*imported.get(first, ()), *rest))
                if not (full.startswith(f"{package}.") and full.rpartition(".")[2] == kind):
                    continue
                given = (*mark.args, *(keyword.value for keyword in mark.keywords if keyword.arg == "name"), None)[0]
                name = texts.get(given.id) if isinstance(given, ast.Name) else getattr(given, "value", None)
                if not isinstance(name, str):
                    raise ValueError(f"{file}, line {mark.lineno}: the name of an entry must be a text, or stand for one "
                                     f"in this file: @{ast.unparse(mark)}")
                yield name, file, node


_parsed = functools.cache(ast.parse)  # planning asks for each file several times
