"""What a finished run leaves for others: Snakemake's own report, and the run as an RO-Crate."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from cupel.reporting.crate import check_crate
from cupel.reporting.provenance import provenance
from tests.conftest import REPOSITORY
from tests.test_workflow import Folder

CAPTIONS = REPOSITORY / "workflow" / "captions"
RULES = "".join(file.read_text() for file in [REPOSITORY / "Snakefile", *(REPOSITORY / "workflow" / "rules").glob("*.smk")])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cifar10):
    folder = Folder(tmp_path_factory.mktemp("run"), cifar10.parents[1].resolve())
    code, output = folder.run()
    assert code == 0, output[-4000:]
    return folder


def test_every_caption_is_used():
    used = set(re.findall(r"captions/(\w+)\.rst", RULES))
    assert used == {file.stem for file in CAPTIONS.glob("*.rst")}


def test_where_a_machine_keeps_things_is_in_no_provenance(tmp_path):
    config = {"data": {"mirror": str(tmp_path), "sources": ["hub", "mirror"]}, "plugins": [str(tmp_path / "own.py")]}
    made = provenance(tmp_path, config, tmp_path, names=[], seeds=[0])
    assert str(tmp_path.parent) not in json.dumps(made)
    assert made["config"]["plugins"] == ["own.py"] and made["config"]["data"]["sources"] == ["hub", "mirror"]


@pytest.mark.slow
def test_the_report_of_snakemake(finished):
    code, output = finished.run("--report", "report.zip")
    assert code == 0, output[-3000:]
    with zipfile.ZipFile(finished.path / "report.zip") as pack:
        names = pack.namelist()
        assert any(name.endswith("report.html") for name in names)
        data = {name.rpartition("/")[2]: name for name in names}
        text = {name: pack.read(name).decode(errors="replace") for name in names if name.endswith((".html", ".js", ".rst"))}
    everything = "\n".join(text.values())
    for word in ("claims", "tables", "figures", "page", "provenance", "triggers", "all papers"):  # with a capital or without
        assert word in everything.lower(), word
    assert "claims.csv" in data and "provenance.json" in data and "report.html" in data and "triggers_cifar10.png" in data
    # captions are filled in
    assert "from the cells of its grid at scale smoke" in re.sub(r"</?\w+>", "", everything)
    assert "{{" not in "".join(re.findall(r"caption[^,]*", everything))


@pytest.mark.slow
def test_the_crate_of_a_run(finished, tmp_path):
    code, output = finished.run("--", "crate")
    assert code == 0, output[-4000:]
    crate = finished.path / "results/smoke/crate"
    assert check_crate(crate) == []
    graph = {entity["@id"]: entity for entity in json.loads((crate / "ro-crate-metadata.json").read_text())["@graph"]}
    for name in ("index.html", "claims.csv", "cells.parquet", "provenance.json", "papers/fst/report.html",
                 "papers/fst/report.ipynb", "cross.html", "claims.html", "cells.html", "cross/asr.svg"):
        assert f"results/smoke/{name}" in graph
    assert not [name for name in graph if name.endswith(".safetensors")]
    # pages that refer to pictures find them in the crate
    page = crate / "results/smoke/index.html"
    references = re.findall(r'src="([^"#:]+)"', page.read_text())
    assert references and all((page.parent / reference).is_file() for reference in references)
    # what is in it is enough to plan the same run elsewhere
    for name in ("Snakefile", "config.yaml", "workflow", "profiles"):
        copy = shutil.copytree if (crate / name).is_dir() else shutil.copy
        copy(crate / name, tmp_path / name)
    again = subprocess.run([sys.executable, "-m", "snakemake", "-n", "--cores", "1"], cwd=tmp_path, text=True,
                           capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "workflow")})
    assert again.returncode == 0 and "index" in again.stdout + again.stderr, again.stderr[-2000:]
    code, output = finished.run("-n", "--", "crate")
    assert code == 0 and "Nothing to be done" in output
