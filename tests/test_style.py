"""What every function of the library keeps to."""

import ast

from cupel.settings import LIBRARY


def test_no_call_nobody_can_read():
    """At most five positional parameters; what travels together is one object, the rest is by keyword."""
    long = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        file = path.relative_to(LIBRARY).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
                names = [name for name in names if name not in ("self", "cls")]
                if len(names) > 5:
                    long[f"{file}: {node.name}"] = names
    assert not long
