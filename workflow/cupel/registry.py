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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


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
        if name not in self:
            raise ValueError(unknown(self.kind, name, self))
        return self[name]

    def settings(self, name: str, given: dict) -> dict:
        """All keyword arguments of the function `name`: those given, the others at their defaults.

        Raises:
            ValueError: unknown name, or an argument that the function does not have.
        """
        defaults = self.find(name).__kwdefaults__ or {}
        for key in given:
            if key not in defaults:
                raise ValueError(unknown(f"parameter of {self.kind} {name}", key, defaults))
        return defaults | given


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    names = f"known are {', '.join(known)}" if known else "none is known"
    return f"unknown {kind} {name!r}: {names}" + (f"; did you mean {near[0]!r}?" if near else "")


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Execute the user's plugin files, which register what is theirs.

    Raises:
        FileNotFoundError: a file is missing.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"plugin {path} does not exist (config.yaml, key plugins)")
        spec = importlib.util.spec_from_file_location(f"cupel_plugin_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def definitions(kind: str, files: Iterable[str | Path], package: str = "cupel") -> dict[str, str]:
    """Names registered as by `signatures`, each with `<file>:<definition>`, a root of `cupel.digest.code_digest`."""
    return {name: f"{file}:{node.name}" for name, file, node in _registered(kind, files, package)}


def signatures(kind: str, files: Iterable[str | Path], package: str = "cupel") -> dict[str, set[str]]:
    """Names registered by a package's decorator `kind` (`attack`, `defence`, ...) in `files`, each with its parameter names.

    A file may import the decorators of several families, under names of its own where they would be the same. Fields of
    base classes count where the base is defined in `files` too.

    Read from the syntax tree: configuration is checked in milliseconds, before any library is imported.
    """
    files = list(files)
    classes = {node.name: node for file in files for node in _tree(file).body if isinstance(node, ast.ClassDef)}

    def fields(node: ast.ClassDef) -> set[str]:
        own = {item.target.id for item in node.body
               if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)} - {"tensors"}
        return own.union(*(fields(classes[base.id]) for base in node.bases if getattr(base, "id", None) in classes))

    return {name: fields(node) if isinstance(node, ast.ClassDef) else {argument.arg for argument in node.args.kwonlyargs}
            for name, _, node in _registered(kind, files, package)}


def _registered(kind: str, files: Iterable[str | Path],
                package: str) -> Iterator[tuple[str, str | Path, ast.ClassDef | ast.FunctionDef]]:
    for file in files:
        body = _tree(file).body
        names = {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom)
                 and (node.module or "").startswith(package) for alias in node.names if alias.name == kind}
        names |= {kind for node in body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == kind}
        for node in body:
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", None) in names:
                    yield decorator.args[0].value, file, node


def _tree(file: str | Path) -> ast.Module:
    return _parsed(Path(file).read_text(encoding="utf-8"))


_parsed = functools.cache(ast.parse)  # planning asks for each file several times
