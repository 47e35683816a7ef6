"""A run as an RO-Crate: essentials of the profile, checksums, and what a damaged crate is told."""

import json
import os

import pytest
import yaml

from cupel.files import digest
from cupel.reporting.crate import check_crate, expand, write_crate

CONFIG = {"scale": "smoke", "papers": ["fst"], "seeds": None, "device": "auto", "data": {"folder": "data"}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run(tmp_path):
    """A small repository, results and everything that the writer is given."""
    root, base = tmp_path / "repository", tmp_path / "results" / "smoke"
    for name, text in {"Snakefile": "rule all:\n", "workflow/rules/common.smk": "x = 1\n", "workflow/cupel/a.py": "",
                       "config.yaml": "scale: demo\n", "tests/test_x.py": "", "docs/results/big.png": "",
                       "README.md": "# x"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, text in {"index.html": "<html>", "papers/fst/tables/a b.csv": "1,2\n", "cells.parquet": "x",
                       ".snakemake_timestamp": ""}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
        os.utime(base / name, (2_000_000_000, 2_000_000_000))
    times = tmp_path / "results" / "benchmark" / "smoke" / "victim.tsv"
    times.parent.mkdir(parents=True)
    times.write_text("s\th:m:s\n100.0\t0:01:40\n")
    os.utime(times, (1_999_999_000, 1_999_999_000))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"name": "cifar10", "content_sha256": "ab" * 32, "counts": {"train": [1, 2], "test": [3]},
                                    "source": {"files": [{"origin": "npm package x@1", "checksum": "sha256:cd"}]},
                                    "licence": "none stated"}))
    versions = {"python": "3.12.1", "torch": "2.13.0", "snakemake": "9.27.1", "system": "Linux-6"}
    provenance = {"commit": COMMIT, "versions": versions, "processor": "a chip", "seeds": [0, 1]}
    return {"folder": base / "crate", "root": root, "config": CONFIG, "base": base, "provenance": provenance,
            "results": [base / "index.html", base / "papers", base / "cells.parquet"], "manifests": [manifest],
            "papers": [{"key": "fst", "title": "A title", "reference": "NeurIPS 2023"}],
            "benchmarks": tmp_path / "results" / "benchmark" / "smoke"}


def entities(document):
    return {entity["@id"]: entity for entity in document["@graph"]}


def test_the_profile(run):
    graph = entities(write_crate(**run))
    assert check_crate(run["folder"]) == []
    about = graph["ro-crate-metadata.json"]
    assert {"@id": "https://w3id.org/ro/crate/1.1"} in about["conformsTo"]
    top = graph["./"]
    assert {"@id": "https://w3id.org/ro/wfrun/workflow/0.5"} in top["conformsTo"] and top["mainEntity"] == {"@id": "Snakefile"}
    for link in top["conformsTo"]:
        assert graph[link["@id"]]["@type"] == "CreativeWork"
    main = graph["Snakefile"]
    assert set(main["@type"]) == {"File", "SoftwareSourceCode", "ComputationalWorkflow"} and main["version"] == COMMIT
    assert graph[main["programmingLanguage"]["@id"]]["name"] == "Snakemake"
    assert graph["#torch"]["softwareVersion"] == "2.13.0" and "#system" not in graph
    (action,) = [entity for entity in graph.values() if entity["@type"] == "CreateAction"]
    assert action["instrument"] == {"@id": "Snakefile"} and top["mentions"] == {"@id": action["@id"]}
    assert action["startTime"] == "2033-05-18T03:15:00+00:00" and action["endTime"] == "2033-05-18T03:33:20+00:00"
    results = {"results/smoke/index.html", "results/smoke/papers/fst/tables/a%20b.csv", "results/smoke/cells.parquet"}
    assert {link["@id"] for link in action["result"]} == results
    assert {link["@id"] for link in action["object"]} == {
        "config.yaml", "#data-cifar10", *(f"#value-{name}" for name in ("scale", "papers", "seeds", "device"))}
    assert graph["#value-scale"]["exampleOfWork"] == {"@id": "#parameter-scale"}
    assert {link["@id"] for link in main["input"]} == {f"#parameter-{n}" for n in ("scale", "papers", "seeds", "device")}
    assert graph["#data-cifar10"]["sha256"] == "ab" * 32 and "3 training and 3 test" in graph["#data-cifar10"]["description"]
    assert results <= {part["@id"] for part in top["hasPart"]}


def test_files_are_there_with_their_checksums(run):
    graph = entities(write_crate(**run))
    described = {name for name, entity in graph.items() if "File" in entity["@type"]}
    there = {str(path.relative_to(run["folder"])).replace(" ", "%20") for path in run["folder"].rglob("*") if path.is_file()}
    assert there - {"ro-crate-metadata.json"} == described
    assert not {name for name in described if name.startswith(("tests/", "docs/")) or "snakemake_timestamp" in name}
    for name in described:
        assert graph[name]["sha256"] == digest(run["folder"] / name.replace("%20", " "))
    assert yaml.safe_load((run["folder"] / "config.yaml").read_text()) == CONFIG  # the run's, not the repository's


def test_the_same_run_is_the_same_crate(run):
    assert write_crate(**run)["@graph"] == write_crate(**run)["@graph"]


@pytest.mark.parametrize("change, complaint", [
    (lambda folder, graph: (folder / "results/smoke/index.html").write_text("<HTML>"), "index.html is not what the crate says"),
    (lambda folder, graph: (folder / "Snakefile").unlink(), "Snakefile is not there"),
    (lambda folder, graph: graph["./"].pop("conformsTo"), "does not conform to https://w3id.org/ro/wfrun/workflow/0.5"),
    (lambda folder, graph: graph["./"].pop("mainEntity"), "mainEntity is no ComputationalWorkflow"),
    (lambda folder, graph: graph.pop("#data-cifar10"), "names #data-cifar10, which is not described"),
    (lambda folder, graph: graph["./"].update(mentions=[]), "is not mentioned by the root"),
])
def test_a_damaged_crate_is_told_what_is_wrong(run, change, complaint):
    document = write_crate(**run)
    graph = entities(document)
    change(run["folder"], graph)
    (run["folder"] / "ro-crate-metadata.json").write_text(json.dumps({**document, "@graph": list(graph.values())}))
    assert any(complaint in sentence for sentence in check_crate(run["folder"]))


def test_a_writer_that_fails_leaves_the_old_crate(run, monkeypatch):
    write_crate(**run)
    before = (run["folder"] / "ro-crate-metadata.json").read_bytes()
    monkeypatch.setattr("rocrate.rocrate.ROCrate.write", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_crate(**run)
    assert (run["folder"] / "ro-crate-metadata.json").read_bytes() == before
    assert not list(run["folder"].parent.glob(".crate-*"))


def test_expand(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/x", "a/.hidden", "b"):
        (tmp_path / name).touch()
    assert expand([tmp_path / "b", tmp_path / "a", tmp_path / "b"]) == [tmp_path / "a" / "x", tmp_path / "b"]
