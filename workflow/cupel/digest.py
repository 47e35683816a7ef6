"""What a job's code means, as a short hash: a job runs again when code that it uses has changed, and only then.

Code is read definition by definition. Every name that a definition uses is followed, through imports, to the definition it
stands for, in the library or in a file beside the one at hand; what is not ours counts by its name.

- Docstrings, comments, layout, the order of definitions, and the types of arguments and results mean nothing.
- What a module does on import (calls, loops, `if`, `try`, a decorator of ours that notes a function) counts wherever a part of
  the module is used.
- What is looked up by name cannot be followed: entries of a `Registry`, `importlib.import_module`, files that are opened. The
  caller names them as further roots.
"""

import ast
import functools
import hashlib
import symtable
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: instead of the name of a definition: all of a file, or what it does on import
WHOLE, IMPORT = "*", ""
Place = tuple[Path, str]  # a file and the name of a definition in it
Chain = tuple[str, ...]  # a name and the attributes that follow it
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)


class Piece:
    """The statements of a file that define one name."""

    def __init__(self, nodes: list[ast.stmt]):
        self.nodes = nodes

    @functools.cached_property
    def read(self) -> tuple[str, set[Chain], dict[str, Chain]]:
        """Code without what means nothing, the names that it takes from outside, and its own imports."""
        chains, imports = set(), {}
        for node in self.nodes:
            _scan(node, chains, imports)
        text = ast.unparse(ast.Module(self.nodes, []))
        outer = _outer(symtable.symtable(text, "", "exec")) | imports.keys()
        return text, {chain for chain in chains if chain[0] in outer}, imports

    def decorators(self) -> set[Chain]:
        found = set()
        for mark in (mark for node in self.nodes for mark in getattr(node, "decorator_list", [])):
            _scan(getattr(mark, "func", mark), found, {})
        return found


@functools.cache
def _parsed(source: str) -> tuple[dict[str, Piece], dict[str, Chain]]:
    """Pieces of a file by the name that they define, `IMPORT` for all the rest; and what the file imports."""
    found, imports = defaultdict(list, {IMPORT: []}), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        names = _bound(node)
        if not names:
            _scan(node, set(), imports)
        if not (_is_text(node) or isinstance(node, (ast.Import, ast.ImportFrom))):
            for name in names or [IMPORT]:
                found[name].append(node)
    return {name: Piece(nodes) for name, nodes in found.items()}, imports


def read_python(path: str | Path, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of the source in a file.

    Raises:
        ValueError: it is not Python; the text names file and line.
    """
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None


def imports_of(node: ast.Import | ast.ImportFrom) -> dict[str, Chain]:
    """What an import binds: a name to a module, `("numpy",)`, or to a module and a name in it, `("cupel.rng", "derive")`."""
    if isinstance(node, ast.ImportFrom):
        source = "." * node.level + (node.module or "")
        return {alias.asname or alias.name: (source,) if alias.name == "*" else (source, alias.name) for alias in node.names}
    modules = {alias: alias.name if alias.asname else alias.name.partition(".")[0] for alias in node.names}
    return {alias.asname or module: (module,) for alias, module in modules.items()}  # without `as`, `import a.b` binds a


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement defines; none if it does anything else."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    targets = getattr(node, "targets", None) or [node.target] if isinstance(node, ASSIGNMENTS) else []
    targets = [item for target in targets for item in getattr(target, "elts", [target])]
    return [item.id for item in targets] if all(isinstance(item, ast.Name) for item in targets) else []


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _scan(node: ast.AST, chains: set[Chain], imports: dict[str, Chain]) -> None:
    """Collect names with their attributes and what imports bind; take out docstrings, and types of arguments and results."""
    attributes, base = [], node
    while isinstance(base, ast.Attribute):
        attributes, base = [base.attr, *attributes], base.value
    if isinstance(base, ast.Name):
        chains.add((base.id, *attributes))
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        imports.update(imports_of(node))
    elif isinstance(node, ast.arg):
        node.annotation = None
    else:
        if isinstance(node, DEFINITIONS):
            node.body = [item for item in node.body if not _is_text(item)] or [ast.Pass()]
            node.returns = None
        for item in ast.iter_child_nodes(base):
            _scan(item, chains, imports)


def _outer(table: symtable.SymbolTable) -> set[str]:
    """Names that code takes from its module, at any depth."""
    names = {symbol.get_name() for symbol in table.get_symbols()
             if symbol.is_global() or (symbol.is_referenced() and table.get_type() != "function")}
    return names.union(*map(_outer, table.get_children()))


class Code:
    """The code of a library, and of files that use it.

    Args:
        library: folder of the package.
    """

    def __init__(self, library: str | Path):
        self.library = Path(library).resolve()
        self._pieces = functools.cache(functools.partial(read_python, parse=_parsed))
        self._hashes, self._step = functools.cache(self._hashes), functools.cache(self._step)
        self._file, self._label = functools.cache(self._file), functools.cache(self._label)

    def digest(self, *roots: str | Path) -> str:
        """16 hex digits over all that the roots use.

        Args:
            roots: a Python file (all of it); another file (its bytes); or one definition, as
                `cupel.images.attacks.badnets:BadNets` or `path/to/plugin.py:Name`.

        Raises:
            ValueError: there is no such file or definition.
        """
        found = set().union(*(self._hashes(str(root)) for root in roots))
        return hashlib.sha256(b"".join(sorted(found))).hexdigest()[:16]

    def _hashes(self, root: str) -> set[bytes]:
        return {self._step(place)[0] for place in self.reached(root)}

    def reached(self, root: str | Path) -> set[Place]:
        """All definitions that a root uses, near or far."""
        todo, seen = {self._root(str(root))}, set()
        while todo:
            seen |= todo
            todo = set().union(*(self._step(place)[1] for place in todo)) - seen
        return seen

    def _root(self, root: str) -> Place:
        source, _, name = root.rpartition(":")
        if Path(root).is_file():
            return Path(root).resolve(), WHOLE
        path = Path(source).resolve() if Path(source).is_file() else self._file(source, self.library)
        place = self._attribute(path, (name,)) if path else None
        if not isinstance(place, tuple) or place[1] == IMPORT:
            raise ValueError(f"code digest: there is no file or definition {root!r}")
        return place

    def _step(self, place: Place) -> tuple[bytes, set[Place]]:
        """Hash of a definition together with what the names in it stand for, and where these lead."""
        path, name = place
        if path.suffix != ".py":
            return hashlib.sha256(f"{path.name}\n".encode() + path.read_bytes()).digest(), set()
        if path == self.library / "digest.py":  # how code is hashed changes no result
            return b"", set()
        pieces, imported = self._pieces(path)
        exported = imported if path.name == "__init__.py" else ()
        if name == WHOLE:
            places = {(path, other) for other in pieces} | {self._meaning(path, (other,)) for other in exported}
            return b"", {place for place in places if isinstance(place, tuple)}
        text, chains, local = pieces[name].read
        lines, places = [self._label(place), text], {(path, IMPORT)}
        if name == IMPORT:
            chains = chains | {("*",)} if "*" in imported else chains
            places |= {(path, other) for other in pieces if self._is_noted(path, pieces[other])}
            package = path.parents[path.name == "__init__.py"] / "__init__.py"
            places |= {(package, IMPORT)} if package.is_file() else set()
        for chain in sorted(chains):
            meaning = self._meaning(path, chain, local)
            if isinstance(meaning, tuple):
                places.add(meaning)
                meaning = self._label(meaning)
            lines.append(f"{'.'.join(chain)} is {meaning}")
        return hashlib.sha256("\n".join(lines).encode()).digest(), places

    def _label(self, place: Place) -> str:
        path, name = place  # the same wherever the repository lies
        return f"{path.relative_to(self.library) if path.is_relative_to(self.library) else path.name}:{name}"

    def _is_noted(self, path: Path, piece: Piece) -> bool:
        """Whether a decorator of ours sees a definition on import; entries of a `Registry` count when they are asked for."""
        places = [self._meaning(path, chain) for chain in piece.decorators()]
        ours = [self._pieces(place[0])[0][place[1]] for place in places if isinstance(place, tuple)]
        return any(" = Registry(" not in mark.read[0] for mark in ours)

    def _meaning(self, path: Path, chain: Chain, local: dict[str, Chain] | None = None) -> Place | str | None:
        """What a name in a file stands for: a place, the full name of what is not ours, or None where it is built in.

        Args:
            path: the file.
            chain: the name with its attributes.
            local: imports inside the definition that uses it.
        """
        pieces, imports = self._pieces(path)
        source = (local or {}).get(chain[0]) or (None if chain[0] in pieces else imports.get(chain[0]))
        if source is None:
            return (path, chain[0]) if chain[0] in pieces else None
        module = self._file(source[0], path)
        return self._attribute(module, (*source[1:], *chain[1:]), user=path) if module else ".".join(source)

    def _attribute(self, path: Path, chain: Chain, user: Path | None = None) -> Place | str:
        """What a chain of attributes of a module stands for; a package that imports from itself means its own modules."""
        if not chain:
            return path, WHOLE
        if path != user and (found := self._meaning(path, chain)):
            return found
        module = self._file(f".{chain[0]}", path) if path.name == "__init__.py" else None
        return self._attribute(module, chain[1:]) if module else (path, IMPORT)

    def _file(self, module: str, near: Path) -> Path | None:
        """File of a module as the file `near` names it; None if it is not ours."""
        dots = len(module) - len(module.lstrip("."))
        beside = [] if near.is_relative_to(self.library) else [near.parent]
        for folder in [near.parents[dots - 1]] if dots else [self.library.parent, *beside]:
            base = folder.joinpath(*module.lstrip(".").split("."))
            for file in (base.with_suffix(".py"), base / "__init__.py"):
                if file.is_file():
                    return file
        return None


#: `Code.digest` of this library
code_digest = functools.cache(Code(Path(__file__).parent).digest)
