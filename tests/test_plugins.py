"""Plugins: what is found in a file without importing it, what is refused before the first job, how they are loaded."""

import re

import numpy as np
import pytest

from cupel.digest import code_digest
from cupel.experiment import Grid
from cupel.images import attacks, defences
from cupel.registry import entries, load_plugins
from cupel.settings import ConfigError

ATTACK = "@dataclass(frozen=True)\nclass {}(Attack):\n    needs = 'data'\n    size: int = 3\n" \
         "    shape: ClassVar[str] = 'round'\n"
HEAD = "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom cupel.images.attacks import Attack, attack\n"


@pytest.mark.parametrize("imports, mark", [
    ("from cupel.images.attacks import attack", "@attack('mine')"),
    ("from cupel.images.attacks import attack as register", "@register('mine')"),
    ("from cupel.images.attacks import attack", "@attack(name='mine')"),
    ("from cupel.images.attacks import attack\nNAME = 'mine'", "@attack(NAME)"),
    ("from cupel.images import attacks", "@attacks.attack('mine')"),
    ("import cupel.images.attacks as known", "@known.attack('mine')"),
    ("import cupel.images.attacks", "@cupel.images.attacks.attack('mine')"),
])
def test_a_decorator_in_every_form(tmp_path, imports, mark):
    file = tmp_path / "plugin.py"
    file.write_text(f"{imports}\n{mark}\n{ATTACK.format('Mine')}")
    found = entries("attack", [file], "cupel.images")
    assert set(found) == {"mine"} and found["mine"].parameters == {"size"}
    assert found["mine"].values == {"needs": "data", "size": 3, "shape": "round"}
    assert not entries("attack", [file], "cupel.text") and not entries("defence", [file], "cupel.images")


def test_what_an_attack_needs_is_its_own(tmp_path):
    """As docs/extending.md writes it; another attack in the same file does not need it."""
    file = tmp_path / "plugin.py"
    other = "@attack('other')\n@dataclass(frozen=True)\nclass Other(Attack):\n    pass\n"
    file.write_text(f"{HEAD}@attack('mine')\n{ATTACK.format('Mine')}{other}@attack('child')\nclass Child(Mine):\n    pass\n")
    family = Grid(["fst"], "smoke", plugins=[str(file)]).families["images"]
    assert [family.needs(name) for name in ("mine", "other", "child")] == ["data", "", "data"]


@pytest.mark.parametrize("text, said", [
    ("from cupel.images.defences import defence\n@defence('fst')\ndef fst(victim, budget, rng): pass",
     r"defence 'fst' is defined in .*fst.py and in .*plugin.py: give one of them another name"),
    (f"{HEAD}@attack('badnets')\n{ATTACK.format('B')}", r"attack 'badnets' is defined in .*badnets.py and in .*plugin.py"),
    ("from cupel.images.models import model\n@model('resnet18')\ndef mine(): pass", "model 'resnet18' is defined in"),
    ("from cupel.text.defences import defence\n@defence('crow')\ndef mine(): pass", r"defence 'crow' is defined in .*crow.py"),
    ("def broken(:\n", r"config.yaml: plugins: .*plugin.py, line 1: invalid syntax"),
    (f"{HEAD}@attack('a' + 'b')\n{ATTACK.format('B')}", r"plugin.py, line 4: the name of an entry must be a text"),
    (f"{HEAD}@attack()\n{ATTACK.format('B')}", r"plugin.py, line 4"),
])
def test_what_is_refused_before_the_first_job(tmp_path, text, said):
    (tmp_path / "plugin.py").write_text(text)
    with pytest.raises(ConfigError, match=said):
        Grid(["fst"], "smoke", plugins=[str(tmp_path / "plugin.py")])


def test_a_neighbour_that_is_no_python_is_named(tmp_path):
    (tmp_path / "neighbour_broken.py").write_text("def broken(:\n")
    (tmp_path / "plugin.py").write_text("import neighbour_broken\ndef mine(): return neighbour_broken.x\n")
    with pytest.raises(ValueError, match=r"neighbour_broken.py, line 1: invalid syntax"):
        code_digest(f"{tmp_path / 'plugin.py'}:mine")


def test_a_plugin_with_a_neighbour_and_postponed_annotations(tmp_path):
    (tmp_path / "neighbour_of_plugin.py").write_text("STRENGTH = 7\n")
    (tmp_path / "plugin.py").write_text(
        f"from __future__ import annotations\n{HEAD}import neighbour_of_plugin\n@attack('with_neighbour')\n{ATTACK.format('W')}"
        "    def stamp(self, images):\n        return images + neighbour_of_plugin.STRENGTH\n")
    load_plugins([tmp_path / "plugin.py"])
    try:
        assert attacks.build("with_neighbour").stamp(np.zeros(1, np.uint8)).tolist() == [7]
    finally:
        attacks.ATTACKS.pop("with_neighbour")
    (tmp_path / "plugin.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ImportError, match=r"plugin .*plugin.py cannot be executed: ModuleNotFoundError"):
        load_plugins([tmp_path / "plugin.py"])


def test_parameters_that_an_attack_has():
    with pytest.raises(ValueError, match=r"'alph'; its parameters are alpha, picture, policy$"):
        attacks.build("blended", alph=0.1)


@pytest.mark.parametrize("returned, said", [(None, "a NoneType"), ((1, 2), "2 objects"), ((1, [], 2), "3 objects")])
def test_what_a_defence_returns(monkeypatch, returned, said):
    def own(victim, budget, rng):
        return returned

    monkeypatch.setitem(defences.DEFENCES, "own", own)
    budget = defences.Budget(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int64), 1)
    with pytest.raises(TypeError, match=f"defence own in {re.escape(__file__)} must return the network") as error:
        defences.purify("own", None, budget, np.random.default_rng(0))
    assert said in str(error.value)
