"""Which jobs an edit of the code makes anew."""

import ast
import shutil
from pathlib import Path

import pytest

import cupel
from cupel.digest import Code, code_digest

WORKFLOW = Path(cupel.__file__).parents[1]
SCRIPTS = {path.stem: [path.name] for path in sorted((WORKFLOW / "scripts").glob("*.py"))}
PAGES = ("index", "cells_page", "cross", "paper_page", "zoo_report")
OBJECTS = {
    "badnets": "cupel.images.attacks.badnets:BadNets",
    "wanet": "cupel.images.attacks.wanet:WaNet",
    "resnet18": "cupel.images.models.resnet:resnet18",
    "vit": "cupel.images.models.torchvision_zoo:vit_b_16",
    "fst": "cupel.images.defences.fst:fst",
    "anp": "cupel.images.defences.anp:anp",
}
#: scripts as they are, and jobs with what they look up by name
JOBS = {**SCRIPTS, **{page: [f"{page}.py", "index.html.j2"] for page in PAGES}}
JOBS["purify_text"] = ["purify_text.py", "cupel.text.defences.crow:crow"]
JOBS["attack_network"] = ["attack_network.py", "cupel.robust.evaluations:gallery"]
for attack in ("badnets", "wanet"):
    JOBS[f"poison {attack}"] = ["poison.py", OBJECTS[attack]]
    for model in ("resnet18", "vit"):
        JOBS[f"train_victim {attack} {model}"] = ["train_victim.py", OBJECTS[attack], OBJECTS[model]]
        for defence in ("fst", "anp"):
            JOBS[f"purify {attack} {model} {defence}"] = ["purify.py", *map(OBJECTS.get, (attack, model, defence))]

for paper in ("fst", "ims"):
    JOBS[f"report_{paper}"] = ["report_paper.py", f"papers/{paper}/report.py"]

TEXT = {"train_text_victim", "purify_text"}
ROBUST = {"train_robust", "attack_network"}


def jobs(*words: str) -> set[str]:
    """Jobs whose name has one of these words."""
    return {job for job in JOBS if set(job.split()) & set(words)}


#: file, definition, and the jobs that an edit of it makes anew
EDITS = [
    ("robust/models.py", "Chain", ROBUST),
    ("robust/objectives.py", "Objective", {"train_robust"}),
    ("robust/evaluations.py", "gallery", {"attack_network"}),
    ("robust/evaluations.py", "pgd", set()),  # an evaluation that nobody here asks for
    ("images/defences/fst.py", "fst", jobs("fst")),
    ("images/attacks/wanet.py", "WaNet", jobs("wanet")),
    ("images/models/resnet.py", "resnet18", jobs("resnet18")),
    ("images/models/torchvision_zoo.py", "VisionTransformer", jobs("vit")),
    ("training/engine.py", "fit", jobs("train_victim", "fst") | {"train_robust", "look_at_own", "purify_own"}),
    ("images/stages.py", "_leaks", jobs("purify")),
    ("images/stages.py", "prepare_trigger", {"prepare_trigger"}),
    ("text/training.py", "train_lora", TEXT),
    ("text/defences/wanda.py", "wanda", set()),
    ("evaluation/claims.py", "judge", {"judge_claims", "index", "paper_page"}),
    ("reporting/figures.py", "COLOURS", {"cross", "zoo_report", "report_paper", "report_fst", "report_ims", "feature_maps",
                                         "compare", "index"}),
    ("job.py", "logged", set(JOBS)),
    ("digest.py", "Code", set()),
]


def edited(source: str, name: str) -> str:
    """The source with another body, or another value, of a definition."""
    tree = ast.parse(source)
    for node in tree.body:
        if getattr(node, "name", "") == name:
            node.body.append(ast.parse("edited = 1").body[0])
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            node.value = ast.Constant("edited")
    return ast.unparse(tree)


class Docstrings(ast.NodeTransformer):
    """Other docstrings, and a type for every argument."""

    def visit_Expr(self, node):
        return ast.Expr(ast.Constant("Edited.")) if isinstance(node.value, ast.Constant) else node

    def visit_Lambda(self, node):
        return node

    def visit_arg(self, node):
        return ast.arg(node.arg, ast.parse("Edited | None", mode="eval").body)


def with_other_docstrings(source: str) -> str:
    return ast.unparse(ast.fix_missing_locations(Docstrings().visit(ast.parse(source))))


def with_comments(source: str) -> str:
    return "# edited\n\n\n" + source.replace("\n    return ", "\n    # edited\n\n    return ")


def reformatted(source: str) -> str:
    return ast.unparse(ast.parse(source))


def in_another_order(source: str) -> str:
    tree = ast.parse(source)
    definitions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    tree.body = [node for node in tree.body if node not in definitions] + definitions[::-1]
    return ast.unparse(tree)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy") / "workflow"
    shutil.copytree(WORKFLOW / "cupel", folder / "cupel", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("scripts", "papers"):
        shutil.copytree(WORKFLOW / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.csv", "*.ipynb"))
    return folder


def digests(folder: Path) -> dict[str, str]:
    places = {".py": folder / "scripts", ".j2": folder / "cupel" / "reporting"}
    code = Code(folder / "cupel")
    return {job: code.digest(*(root if ":" in root else folder / root if "/" in root else places[Path(root).suffix] / root
                               for root in roots)) for job, roots in JOBS.items()}


@pytest.fixture(scope="module")
def before(copy) -> dict[str, str]:
    return digests(copy)


def remade(copy: Path, before: dict[str, str], edits: dict[str, str]) -> set[str]:
    """Jobs that files with other content make anew."""
    kept = {file: (copy / file).read_text() for file in edits}
    try:
        for file, content in edits.items():
            assert content != kept[file], f"{file} is not edited"
            (copy / file).write_text(content)
        return {job for job, digest in digests(copy).items() if digest != before[job]}
    finally:
        for file, content in kept.items():
            (copy / file).write_text(content)


def test_jobs_differ(before):
    assert len(set(before.values())) == len(JOBS)
    assert before["poison"] == code_digest(WORKFLOW / "scripts" / "poison.py")  # wherever the repository lies


@pytest.mark.parametrize(("file", "name", "expected"), EDITS, ids=[f"{name} of {file}" for file, name, _ in EDITS])
def test_an_edit_makes_exactly_what_uses_it(copy, before, file, name, expected):
    path = f"cupel/{file}"
    assert remade(copy, before, {path: edited((copy / path).read_text(), name)}) == expected


def test_a_template_is_its_bytes(copy, before):
    path = "cupel/reporting/index.html.j2"
    assert remade(copy, before, {path: (copy / path).read_text() + " "}) == set(PAGES)


@pytest.mark.parametrize("edit", [with_other_docstrings, with_comments, reformatted, in_another_order])
def test_what_means_nothing(copy, before, edit):
    files = ["job", "files", "cells", "training/engine", "images/stages", "images/attacks/wanet", "images/defences/fst",
             "text/training", "robust/evaluations", "evaluation/claims", "reporting/figures"]
    paths = [f"cupel/{file}.py" for file in files]
    assert remade(copy, before, {path: edit((copy / path).read_text()) for path in paths}) == set()


#: a small library, and a plugin outside of it
SMALL = {
    "lib/__init__.py": "",
    "lib/one.py": "from lib.two import deep\nfrom . import names as known\ndef top(x=known.START): return deep(x)\n"
                  "def other(): return known.START\n",
    "lib/two/__init__.py": "from lib.two.inner import deep, unused\nfrom lib.two import beside\nprint('imported')\n",
    "lib/two/inner.py": "import math\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lib.names import Hint\n"
                        "def deep(x: 'Hint') -> 'Hint':\n    unused = 1\n    return math.floor(x) + unused\n"
                        "def unused(): return 1\n",
    "lib/two/beside.py": "def stand(): return 1\n",
    "lib/names.py": "try:\n    import fast\nexcept ImportError:\n    fast = None\nSTART, END = 0, 1\nclass Hint: pass\n",
    "lib/marks.py": "from lib.registry import Registry\nentry = Registry('entry')\nNOTED = {}\n"
                    "def note(function):\n    NOTED[function.__name__] = function\n    return function\n",
    "lib/registry.py": "class Registry(dict): pass\n",
    "lib/noted.py": "from lib.marks import entry, note\nfrom lib import two\n@note\ndef first(): return two.beside.stand()\n"
                    "@entry\ndef second(): return 2\ndef third(): return 3\n",
    "plugin.py": "from lib.one import top\nimport helper\n"
                 "def mine():\n    from lib import noted\n    return helper.help(noted.third)\n",
    "helper.py": "def help(function): return function()\ndef idle(): pass\n",
}


@pytest.mark.parametrize(("root", "file", "old", "new", "counts"), [
    ("lib.one:top", "lib/two/inner.py", "math.floor", "math.ceil", True),  # through a package that exports it again
    ("lib.one:top", "lib/two/inner.py", "import math", "import cmath as math", True),  # what is not ours counts by its name
    ("lib.one:top", "lib/names.py", "START, END = 0", "START, END = 2", True),  # a default, through a relative import
    ("lib.one:top", "lib/two/__init__.py", "'imported'", "'again'", True),  # runs on import
    ("lib.one:top", "lib/names.py", "fast = None", "fast = 0", True),
    ("lib.one:top", "lib/two/inner.py", "def unused(): return 1", "def unused(): return 2", False),  # hidden by a local name
    ("lib.one:top", "lib/names.py", "class Hint: pass", "class Hint: x = 1", False),  # a type of an argument
    ("lib.one:top", "lib/one.py", "def other(): return", "def other(): return 1 +", False),
    ("lib.one:top", "lib/two/beside.py", "return 1", "return 2", False),  # imported by the package, used by nobody
    ("lib.noted:third", "lib/noted.py", "return two", "return 1 + two", True),  # noted on import
    ("lib.noted:third", "lib/two/beside.py", "return 1", "return 2", True),  # and so is what it uses
    ("lib.noted:third", "lib/noted.py", "return 2", "return 3", False),  # an entry of a registry is asked for by name
    ("lib.noted:second", "lib/noted.py", "return 2", "return 3", True),
    ("lib.two:deep", "lib/two/inner.py", "+ unused", "- unused", True),
    ("plugin.py:mine", "lib/noted.py", "return 3", "return 4", True),  # imported inside a function
    ("plugin.py:mine", "helper.py", "return function()", "return function", True),
    ("plugin.py:mine", "helper.py", "pass", "return 1", False),
    ("plugin.py:mine", "lib/names.py", "START, END = 0", "START, END = 2", False),
    ("plugin.py", "helper.py", "return function()", "return function", True),
])
def test_what_a_name_stands_for(tmp_path, root, file, old, new, counts):
    for path, content in SMALL.items():
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(content)
    root = tmp_path / root if root.startswith("plugin") else root
    first = Code(tmp_path / "lib").digest(root)
    assert old in SMALL[file]
    (tmp_path / file).write_text(SMALL[file].replace(old, new))
    assert (Code(tmp_path / "lib").digest(root) != first) == counts


@pytest.mark.parametrize("root", ["nowhere.py", "cupel.images.attacks.badnets:Nobody", "cupel.nowhere:x"])
def test_an_unknown_root(root):
    with pytest.raises(ValueError, match=f"no file or definition '{root}'"):
        code_digest(root)
