"""A run as an RO-Crate: essentials of the profile, checksums, and what a damaged crate is told."""

import json
import os

import pytest
import yaml

from cupel.files import digest
from cupel.reporting.crate import PARAMETERS, check_crate, write_crate

CONFIG = {"scale": "smoke", "papers": ["fst"], "seeds": None, "device": "auto", "data": {"folder": "data"}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRAVELS = {"Snakefile": "rule all:\n", "README.md": "# x", "workflow/rules/common.smk": "x = 1\n", "workflow/cupel/a.py": ""}
STAYS = {"config.yaml": "scale: demo\n", "tests/test_x.py": "", "docs/results/big.png": "", "workflow/cupel.egg-info/a": "",
         "workflow/cupel/__pycache__/a.pyc": ""}
MADE = {"index.html": "<html>", "papers/fst/tables/a b.csv": "1,2\n", "cells.parquet": "x"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        os.utime(folder / name, (2_000_000_000, 2_000_000_000))


@pytest.fixture
def run(tmp_path):
    """A small repository, results and everything that the writer is given."""
    root, base, times = (tmp_path / name for name in ("repository", "results/smoke", "results/benchmark/smoke"))
    write(root, TRAVELS | STAYS)
    write(base, MADE | {"papers/.snakemake_timestamp": ""})
    write(times, {"victim.tsv": "s\th:m:s\n100.0\t0:01:40\n"})
    os.utime(times / "victim.tsv", (1_999_999_000, 1_999_999_000))
    write(tmp_path, {"manifest.json": json.dumps({
        "name": "cifar10", "content_sha256": "ab" * 32, "counts": {"train": [1, 2], "test": [3]}, "licence": "none stated",
        "source": {"files": [{"origin": "npm package x@1", "checksum": "sha256:cd"}]}})})
    same = {"content_sha256": "ef" * 32, "licence": "none stated"}
    write(tmp_path, {"texts.json": json.dumps({**same, "name": "texts", "counts": {"records": 5}, "source": {
        "kind": "made here", "files": []}}), "model.json": json.dumps({**same, "name": "a-model", "parameters": 7, "source": {
            "kind": "hub", "repository": "owner/name", "commit": "c"}})})
    versions = {"python": "3.12.1", "torch": "2.13.0", "snakemake": "9.27.1", "system": "Linux-6"}
    return {"folder": base / "crate", "root": root, "config": CONFIG, "base": base, "benchmarks": times,
            "results": [base / name for name in ("index.html", "papers", "cells.parquet")],
            "manifests": [tmp_path / f"{name}.json" for name in ("manifest", "texts", "model")],
            "provenance": {"commit": COMMIT, "versions": versions, "processor": "a chip", "seeds": [0, 1]},
            "papers": [{"key": "fst", "title": "A title", "reference": "NeurIPS 2023"}]}


def entities(document):
    return {entity["@id"]: entity for entity in document["@graph"]}


def ids(links):
    return {link["@id"] for link in links}


def test_the_profile(run):
    graph = entities(write_crate(**run))
    assert check_crate(run["folder"]) == []
    assert "https://w3id.org/ro/crate/1.1" in ids(graph["ro-crate-metadata.json"]["conformsTo"])
    top, main = graph["./"], graph["Snakefile"]
    assert "https://w3id.org/ro/wfrun/workflow/0.5" in ids(top["conformsTo"]) and top["mainEntity"] == {"@id": "Snakefile"}
    assert {graph[name]["@type"] for name in ids(top["conformsTo"])} == {"CreativeWork"}
    assert set(main["@type"]) == {"File", "SoftwareSourceCode", "ComputationalWorkflow"} and main["version"] == COMMIT
    assert graph[main["programmingLanguage"]["@id"]]["name"] == "Snakemake"
    assert graph["#torch"]["softwareVersion"] == "2.13.0" and "#system" not in graph
    (action,) = [entity for entity in graph.values() if entity["@type"] == "CreateAction"]
    assert action["instrument"] == {"@id": "Snakefile"} and top["mentions"] == {"@id": action["@id"]}
    assert action["startTime"] == "2033-05-18T03:15:00+00:00" and action["endTime"] == "2033-05-18T03:33:20+00:00"
    assert ids(action["object"]) == {"config.yaml", "#data-cifar10", "#data-texts", "#data-a-model", *(
        f"#value-{name}" for name in PARAMETERS)}
    assert ids(main["input"]) == {f"#parameter-{name}" for name in PARAMETERS}
    assert graph["#value-scale"]["exampleOfWork"] == {"@id": "#parameter-scale"}
    assert graph["#data-cifar10"]["sha256"] == "ab" * 32 and "3 train, 3 test" in graph["#data-cifar10"]["description"]
    assert "5 records" in graph["#data-texts"]["description"] and "7 parameters" in graph["#data-a-model"]["description"]
    assert "From: owner/name" in graph["#data-a-model"]["description"]
    results = {f"results/smoke/{name}".replace(" ", "%20") for name in MADE}
    assert ids(action["result"]) == results and results <= ids(top["hasPart"])


def test_files_are_there_with_their_checksums(run):
    graph = entities(write_crate(**run))
    described = {name.replace("%20", " "): entity for name, entity in graph.items() if "File" in entity["@type"]}
    assert described.keys() == {*TRAVELS, "config.yaml", *(f"results/smoke/{name}" for name in MADE)}
    there = {str(path.relative_to(run["folder"])) for path in run["folder"].rglob("*") if path.is_file()}
    assert there == {*described, "ro-crate-metadata.json"}
    for name, entity in described.items():
        assert entity["sha256"] == digest(run["folder"] / name)
    assert yaml.safe_load((run["folder"] / "config.yaml").read_text()) == CONFIG  # the run's, not the repository's


@pytest.mark.parametrize("change, complaint", [
    (lambda folder, graph: (folder / "results/smoke/index.html").write_text("<HTML>"), "index.html is not what the crate says"),
    (lambda folder, graph: (folder / "Snakefile").unlink(), "Snakefile is not there"),
    (lambda folder, graph: graph["./"].pop("conformsTo"), "does not conform to https://w3id.org/ro/wfrun/workflow/0.5"),
    (lambda folder, graph: graph["./"].pop("mainEntity"), "mainEntity is no ComputationalWorkflow"),
    (lambda folder, graph: graph.pop("#data-cifar10"), "names #data-cifar10, which is not described"),
    (lambda folder, graph: graph["./"].update(mentions=[]), "is not mentioned by the root"),
    (lambda folder, graph: graph.clear(), "cannot be read"),
])
def test_a_damaged_crate_is_told_what_is_wrong(run, change, complaint):
    document = write_crate(**run)
    graph = entities(document)
    change(run["folder"], graph)
    (run["folder"] / "ro-crate-metadata.json").write_text(json.dumps({**document, "@graph": list(graph.values())}))
    assert any(complaint in sentence for sentence in check_crate(run["folder"]))


def test_the_crate_is_replaced_by_an_equal_one_or_stays(run, monkeypatch):
    before = write_crate(**run)["@graph"]
    assert write_crate(**run)["@graph"] == before
    monkeypatch.setattr("rocrate.rocrate.ROCrate.write", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_crate(**run)
    assert json.loads((run["folder"] / "ro-crate-metadata.json").read_text())["@graph"] == before
    assert not list(run["folder"].parent.glob(".crate-*"))
