"""All environments ask for the same versions: pyproject, constraints, conda, container images, and what runs here."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cupel.registry import module
from tests.conftest import REPOSITORY

ENVS = REPOSITORY / "envs"
RECIPES = {"docker": (ENVS / "Dockerfile").read_text(), "apptainer": (ENVS / "cupel.def").read_text()}


@pytest.fixture(scope="module")
def make():
    return module(ENVS / "make.py", "envs_make")


def constraints():
    return [Requirement(line) for line in (ENVS / "constraints.txt").read_text().splitlines() if line.strip()]


def project():
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def wanted():
    return [Requirement(line) for line in
            [*project()["dependencies"], *(r for extra in project()["optional-dependencies"].values() for r in extra)]]


def pinned(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


def test_everything_that_pyproject_asks_for_is_pinned_within_its_range():
    pins = {}
    for requirement in constraints():
        pins.setdefault(canonicalize_name(requirement.name), []).append(pinned(requirement))
    for requirement in wanted():
        found = pins[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(one) for one in found), requirement


def test_one_pin_for_each_platform():
    for python in ("3.11", "3.12", "3.13"):
        for platform, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")):
            place = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": platform,
                     "platform_machine": machine, "implementation_name": "cpython", "platform_python_implementation": "CPython"}
            names = [r.name for r in constraints() if not r.marker or r.marker.evaluate(place)]
            assert len(names) == len(set(names))


def test_the_conda_environment_is_up_to_date(make):
    run = subprocess.run([sys.executable, str(ENVS / "make.py"), "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    content = yaml.safe_load((ENVS / "environment.yaml").read_text())
    assert f"python={make.PYTHON}" in content["dependencies"]
    pins = {str(Requirement(line)) for line in content["dependencies"][-1]["pip"]}
    left_out = {str(r) for r in constraints()} - pins
    assert pins < {str(r) for r in constraints()}
    # parts of CUDA come with torch, in the versions that torch's wheel names itself
    assert {Requirement(line).name.partition("-")[0] for line in left_out} == {"nvidia", "cuda", "triton"}
    assert {canonicalize_name(r.name) for r in wanted()} <= {canonicalize_name(Requirement(line).name) for line in pins}


def test_a_change_of_a_pin_is_noticed(make, tmp_path, monkeypatch):
    (tmp_path / "constraints.txt").write_text((ENVS / "constraints.txt").read_text().replace("numpy==", "numpy==1."))
    (tmp_path / "environment.yaml").write_text((ENVS / "environment.yaml").read_text())
    monkeypatch.setattr(make, "ENVS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make.py", "--check"])
    with pytest.raises(SystemExit, match="not up to date"):
        make.main()


def test_images_and_conda_have_the_same_python_and_tools(make):
    assert f"\npython={make.PYTHON} " in (REPOSITORY / "docs" / "offline.md").read_text()
    assert Requirement(f"python{project()['requires-python']}").specifier.contains(make.PYTHON)
    for text in RECIPES.values():
        assert re.search(r"(?:BASE=|From: )python:([\d.]+)-slim", text)[1] == make.PYTHON
        tools = re.search(r"--no-install-recommends ([^&]+) &&", text)[1].split()
        assert tuple(tools) == make.TOOLS["apt"]


def test_images_install_the_project_with_the_constraints():
    def installs(text):
        return re.findall(r"pip install (.*?)(?:$|;|\n)", text, re.MULTILINE)

    commands = {name: [re.sub(r'"(\$TORCH_INDEX|\{\{ torch_index \}\})"', "INDEX", c) for c in installs(text)]
                for name, text in RECIPES.items()}
    assert commands["docker"] == commands["apptainer"] and len(commands["docker"]) == 2
    assert all("-c envs/constraints.txt" in command for command in commands["docker"])
    assert commands["docker"][1].endswith('-e ".[cluster]"')
    # what the recipes copy is there, and is not kept from docker
    ignored = (ENVS / "Dockerfile.dockerignore").read_text().split()
    for path in ("pyproject.toml", "README.md", "envs/constraints.txt", "workflow"):
        assert (REPOSITORY / path).exists() and f"!{path}" in ignored
        assert all(path in text for text in RECIPES.values())


def test_the_container_of_the_snakefile_is_the_one_that_the_recipe_makes():
    container = re.search(r'^container: "(.*)"$', (REPOSITORY / "Snakefile").read_text(), re.MULTILINE)[1]
    assert f"apptainer build {container} envs/cupel.def" in RECIPES["apptainer"]


def test_what_runs_here_is_what_is_pinned():
    others = {}
    for requirement in constraints():
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            here = Version(version(requirement.name))
        except PackageNotFoundError:
            continue
        if here.public != str(pinned(requirement)):
            others[requirement.name] = f"{here}, pinned is {pinned(requirement)}"
    direct = {canonicalize_name(r.name) for r in wanted()}
    assert not {name: text for name, text in others.items() if canonicalize_name(name) in direct}, others
