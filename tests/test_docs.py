"""README and docs: every command is run by a test, or stands here as too long to run; every link leads somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.test_workflow import Folder

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "config" / "README.md",
         *sorted((REPOSITORY / "docs").glob("*.md")), *sorted((REPOSITORY / "docs" / "papers").glob("*.md")),
         REPOSITORY / "docs" / "results" / "README.md"]
#: beginnings of commands that install, train for hours or need another machine: where what they do is tested
ELSEWHERE = {
    "make reproduce": "continuous integration installs; test_workflow runs the default target",
    "make test": "continuous integration",
    "make .venv/.installed": "continuous integration", "git clone": "a download", "python -m venv": "continuous integration",
    "snakemake --lint": "continuous integration", "snakemake released_weights": "test_robust_dag",
    "apptainer-args": "a setting",
    "cupel ": "test_own", "snakemake --cores all --config own=": "test_own",
    "make lint": "continuous integration", "make faults": "by hand, an hour: tests/faults",
    "make keep": "below",
    "make plan": "test_plan", "python -m cupel.plan": "test_plan", "python envs/make.py": "test_environments",
    "python benchmarks/": "by hand, minutes to hours",
    "python -m cupel.evaluation.agreement": "test_claims", "pytest": "itself",
    "python -c": "below", "snakemake --workflow-profile": "test_slurm, test_generic, test_kubernetes",
    "snakemake --report": "test_workflow, where Snakemake's own report is asked for", "pip install": "continuous integration",
    "conda env": "never run: written for other machines", "docker build": "as conda", "apptainer build": "as conda",
    "export": "a setting", "source": "a setting", "CUDA_VISIBLE_DEVICES": "test_devices", "git add": "test_offline",
    "snakemake --cores all --default-storage-provider": "test_kubernetes",
}
COMMAND = re.compile(r"^(?:make|cupel|snakemake|python|pytest|pip|conda|docker|apptainer|export|source|git"
                     r"|CUDA_VISIBLE_DEVICES)\b.*")


def commands(page: Path) -> list[str]:
    """Commands of a page: lines of indented blocks and of `bash` blocks, and code in a line that begins as a command."""
    text = re.sub(r"```python\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).replace("\\\n", " ")
    fenced = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    inline = re.findall(r"`([^`\n]+)`", text)
    found = [line.strip() for line in [*fenced, *indented, *inline] if COMMAND.match(line.strip())]
    return [re.split(r"\s{3,}|\s+#", command)[0].strip() for command in found if "..." not in command]


def dry(command: str) -> bool:
    """Whether it is one of Snakemake on this machine, which is planned here and run by tests of its parts."""
    return command.startswith("snakemake --cores ")


def test_every_command_is_accounted_for():
    unknown = {f"{page.relative_to(REPOSITORY)}: {command}" for page in PAGES for command in commands(page)
               if page.name != "offline.md" and not dry(command) and not command.startswith(tuple(ELSEWHERE))}
    # a word alone is a name of a tool, not a command
    assert not {text for text in unknown if " " in text.split(": ", 1)[1] and not text.endswith("--list-target-rules")}


def planned() -> list[str]:
    """Commands that are planned: those of Snakemake but for what other tests run as it stands on the page."""
    pages = [page for page in PAGES if page.name not in ("offline.md", "tutorial.md", "extending.md")]
    return sorted({command for page in pages for command in commands(page)
                   if dry(command) and not command.startswith(tuple(ELSEWHERE))})


def shell(command: str, folder: Folder) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(folder.path / "workflow"), "PATH": path}
    return subprocess.run(["bash", "-c", command], cwd=folder.path, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)


@pytest.mark.slow
def test_commands_of_the_pages_plan(tmp_path, cifar10):
    folder = Folder(tmp_path / "run", cifar10.parents[1].resolve())
    folder.set(scale="demo", seeds=None)
    other = folder.path / "elsewhere" / "results" / "demo"  # a run that a page compares with
    other.mkdir(parents=True)
    for name in ("cells.parquet", "claims.csv"):
        (other / name).touch()
    assert len(planned()) >= 8
    for command in planned():
        words = command.replace("snakemake", "snakemake -n --quiet rules reason", 1)
        run = shell(words, folder)
        assert run.returncode == 0, f"{command}\n{run.stdout[-1500:]}"


@pytest.mark.slow
def test_the_tutorial_runs_as_it_stands(tmp_path, cifar10):
    folder = Folder(tmp_path / "tutorial", cifar10.parents[1].resolve())
    text = (REPOSITORY / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (folder.path / "my_defence.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    script = "set -e\n" + "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    run = shell(script, folder)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "mine: Forgetting small weights. 1 claim: 1 not judged" in run.stdout
    lines = run.stdout.splitlines()
    assert len(lines) < 300 and max(map(len, lines)) <= 300 and "Traceback" not in run.stdout


def test_what_is_kept_of_a_run_and_what_a_later_one_goes_on_from(tmp_path):
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    cell = Path("results/desk/images/victims/c/m/r/a@0.1/seed0")
    there = [*(f"results/desk/{file}" for file in ("cells.parquet", "claims.csv", "provenance.json", "papers/fst/tables/t.md")),
             *(cell / name for name in ("metrics.json", "history.csv", "trigger.npz", "work/metrics.json"))]
    for file in there:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(str(file))
    subprocess.run(["make", "keep", "SCALE=desk"], cwd=tmp_path, check=True, capture_output=True)
    shutil.rmtree(tmp_path / "results")
    subprocess.run(["tar", "-xf", "docs/results/desk/cells.tar.xz"], cwd=tmp_path, check=True)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} - {"Makefile"}
    kept = {f"docs/results/desk/{name}" for name in ("cells.parquet", "cells.tar.xz", "claims.csv", "provenance.json",
                                                     "fst/tables/t.md")}
    assert found == kept | {f"{cell}/{name}" for name in ("metrics.json", "history.csv", "trigger.npz")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_every_page_is_linked():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [page.name for page in PAGES if f"{page.parent.name}/{page.name}" not in text and f"({page.name})" not in text
                and page.name not in ("README.md", "CONTRIBUTING.md")]


def test_every_paper_is_cited_and_has_its_page():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    papers = [entry["title"] for entry in cited if entry["type"] == "conference-paper"]
    for key in yaml.safe_load((REPOSITORY / "config.yaml").read_text(encoding="utf-8"))["papers"]:
        page = (REPOSITORY / "docs" / "papers" / f"{key}.md").read_text(encoding="utf-8")
        assert [title for title in papers if title in page], key
