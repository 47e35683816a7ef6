"""Write envs/environment.yaml from pyproject.toml and envs/constraints.txt, the one place where versions are pinned.

    python envs/make.py            writes the file
    python envs/make.py --check    ends with an error where it is not up to date

The constraints themselves are the answer of uv to what pyproject.toml asks for, for every platform at once:

    uv pip compile pyproject.toml --universal --all-extras --python-version 3.11 --no-header --no-annotate \\
        -o envs/constraints.txt
"""

import re
import sys
from pathlib import Path

ENVS = Path(__file__).parent
#: Python of the container images and of the conda environment; any from `requires-python` on will do elsewhere
PYTHON = "3.12"
#: what is no Python package: npm fetches data sets, git names the commit of a run, the compilers are torch.compile's
TOOLS = {"apt": ("g++", "gcc", "git", "npm"), "conda": ("c-compiler", "cxx-compiler", "git", "nodejs")}
#: parts of CUDA, which torch's own wheels ask for in the versions they need: on a machine with a CPU build none
CUDA = re.compile(r"(nvidia|cuda)-|triton==")

HEADER = """# Made by `python envs/make.py` from envs/constraints.txt: change pyproject.toml and the constraints, not this file.
#   conda env create -f envs/environment.yaml && conda activate cupel && pip install --no-deps -e .
"""


def pins() -> list[str]:
    """Lines of the constraints that an environment names itself: all but parts of CUDA."""
    lines = (ENVS / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not CUDA.match(line)]


def environment() -> str:
    """The conda environment."""
    lines = ["name: cupel", "channels:", "  - conda-forge", "dependencies:", f"  - python={PYTHON}", "  - pip",
             *(f"  - {tool}" for tool in TOOLS["conda"]), "  - pip:"]
    return HEADER + "\n".join([*lines, *(f'      - "{pin}"' for pin in pins())]) + "\n"


def main() -> None:
    file = ENVS / "environment.yaml"
    if "--check" not in sys.argv:
        file.write_text(environment(), encoding="utf-8")
    elif not file.is_file() or file.read_text(encoding="utf-8") != environment():
        sys.exit(f"{file} is not up to date: python envs/make.py")


if __name__ == "__main__":
    main()
