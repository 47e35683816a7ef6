"""A run as an RO-Crate: workflow, settings, inputs and results in one folder, described for machines.

Follows the Workflow Run Crate profile 0.5 (https://w3id.org/ro/wfrun/workflow/0.5) on RO-Crate 1.1: the workflow is the
main entity, its run a CreateAction with the settings and data sets as objects and the files of the report as results.
Every file stands there with its size and sha256; data sets and models are too large to be inside, and are named by the
checksum of their content.
"""

import datetime
import json
import mimetypes
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

import yaml

from cupel.bundle import source_files
from cupel.files import digest, read_json

PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": ("Process Run Crate", "0.5"),
    "https://w3id.org/ro/wfrun/workflow/0.5": ("Workflow Run Crate", "0.5"),
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": ("Workflow RO-Crate", "1.0"),
}
#: terms such as sha256 that RO-Crate itself does not define
TERMS = "https://w3id.org/ro/terms/workflow-run/context"
#: parts of the repository that a run does not need
LEFT_OUT = ("docs/results/", "tests/", ".")
TYPES = {".parquet": "application/vnd.apache.parquet", ".ipynb": "application/x-ipynb+json", ".md": "text/markdown",
         ".yaml": "application/yaml", ".smk": "text/x-python", ".tex": "application/x-tex", ".j2": "text/x-jinja2",
         ".toml": "application/toml", ".cff": "application/yaml"}
#: settings that are parameters of the workflow, with their schema.org type
PARAMETERS = {"scale": "Text", "papers": "Text", "seeds": "Text", "device": "Text"}


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _facts(path: Path) -> dict:
    """What the crate says of a file."""
    facts = {"contentSize": str(path.stat().st_size), "sha256": digest(path)}
    kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
    return facts | ({"encodingFormat": kind} if kind else {})


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Files, and the files in folders, sorted, each once; hidden ones are left out."""
    found = set()
    for path in map(Path, paths):
        found |= {file for file in path.rglob("*") if file.is_file()} if path.is_dir() else {path}
    return sorted(file for file in found if not file.name.startswith("."))


def period(benchmarks: str | Path, results: Iterable[Path]) -> tuple[float, float]:
    """Beginning of the first job and end of the last, seconds since 1970.

    Jobs of several runs count as one: a benchmark file is written when its job ends, and says how long it took.
    """
    begun = []
    for file in Path(benchmarks).rglob("*.tsv"):
        try:
            begun.append(file.stat().st_mtime - float(file.read_text().splitlines()[1].split("\t")[0]))
        except (IndexError, ValueError):
            continue
    ended = max(file.stat().st_mtime for file in results)
    return min([*begun, ended]), ended


def write_crate(folder: str | Path, *, root: str | Path, config: dict, results: Iterable[str | Path], base: str | Path,
                provenance: dict, manifests: Iterable[str | Path], papers: Iterable[dict], benchmarks: str | Path) -> dict:
    """Write the crate of a run; the folder is complete or absent.

    Args:
        folder: of the crate; replaced where there is one.
        root: the repository.
        config: settings of the run, as `config.yaml` in the crate says them.
        results: files and folders below `base` that the run made.
        base: `results/<scale>`.
        provenance: content of provenance.json.
        manifests: manifest.json of every data set.
        papers: dicts with `key`, `title`, `reference`.
        benchmarks: folder of benchmark files, for the times of the run.

    Returns:
        The metadata document, as in `ro-crate-metadata.json`.
    """
    from rocrate.model import ContextEntity
    from rocrate.rocrate import ROCrate

    folder, root, base = Path(folder), Path(root), Path(base)
    made = expand(results)
    begun, ended = period(benchmarks, made)
    crate = ROCrate(version="1.1")
    crate.metadata.extra_contexts.append(TERMS)

    def entity(identifier: str, kind: str, /, **properties):
        return crate.add(ContextEntity(crate, identifier, properties={"@type": kind, **properties}))

    licence = entity("https://spdx.org/licenses/MIT", "CreativeWork", name="MIT License", identifier="MIT",
                     url="https://spdx.org/licenses/MIT")
    crate.root_dataset["license"] = licence
    titles = [f"{paper['title']} ({paper['reference']})" for paper in papers]
    crate.root_dataset["name"] = f"Cupel, scale {config['scale']}: {', '.join(config['papers'])}"
    crate.root_dataset["description"] = ("A run of the Cupel workflow: settings, provenance, tidy table of all cells, tables, "
                                         "figures and verdicts on the claims of: " + "; ".join(titles) +
                                         ". The licence is of the workflow; data sets have their own.")
    crate.root_dataset["datePublished"] = _moment(ended)
    authors = entity("#authors", "Organization", name="The Cupel authors")
    crate.root_dataset["author"] = authors
    crate.root_dataset["conformsTo"] = [entity(identifier, "CreativeWork", name=name, version=version)
                                        for identifier, (name, version) in PROFILES.items()]

    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "config.yaml"
        settings.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False), encoding="utf-8")
        sources = [path for path in source_files(root) if not path.startswith(LEFT_OUT) and path != "config.yaml"]
        versions = provenance["versions"]
        main = crate.add_workflow(root / "Snakefile", "Snakefile", main=True, lang="snakemake",
                                  lang_version=versions.get("snakemake"),
                                  properties={**_facts(root / "Snakefile"), "encodingFormat": "text/x-python"})
        main["name"] = "Cupel: five papers on removing backdoors and on robustness, in one workflow"
        main["version"], main["license"], main["author"] = provenance["commit"], licence, authors
        main["softwareRequirements"] = [
            entity(f"#{name}", "SoftwareApplication", name=name, softwareVersion=version)
            for name, version in versions.items() if name not in ("system", "gpu")]
        main["conformsTo"] = entity("https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE", "CreativeWork",
                                    name="ComputationalWorkflow profile", version="1.0-RELEASE")
        main["hasPart"] = [crate.add_file(root / path, path, properties=_facts(root / path))
                           for path in sources if path != "Snakefile"]
        for part in main["hasPart"]:
            if part.id == "README.md":
                part["about"] = crate.root_dataset
        written = crate.add_file(settings, "config.yaml", properties={
            "name": "Settings of this run", "description": "All keys, with the defaults of those that were not set",
            **_facts(settings)})

        objects = [written]
        for name, kind in PARAMETERS.items():
            parameter = crate.add_formal_parameter(name, kind, f"#parameter-{name}", properties={"valueRequired": "False"})
            main.append_to("input", parameter)
            value = config.get(name)
            words = ", ".join(map(str, value)) if isinstance(value, list) else "of the scale" if value is None else str(value)
            objects.append(entity(f"#value-{name}", "PropertyValue", name=name, value=words, exampleOfWork=parameter))
        for manifest in map(read_json, manifests):
            objects.append(entity(
                f"#data-{manifest['name']}", "CreativeWork", name=manifest["name"], sha256=manifest["content_sha256"],
                description=f"Prepared data set, {sum(manifest['counts']['train'])} training and "
                            f"{sum(manifest['counts']['test'])} test samples; sha256 of the arrays' content. From: "
                            + "; ".join(f"{file['origin']} ({file['checksum']})" for file in manifest["source"]["files"]),
                usageInfo=manifest["licence"]))

        files = []
        for path in made:
            place = f"results/{config['scale']}/{path.relative_to(base).as_posix()}"
            files.append(crate.add_file(path, place, properties=_facts(path)))
        machine = ", ".join(filter(None, [provenance.get("processor"), versions.get("gpu"), versions.get("system")]))
        action = crate.add_action(
            main, f"#run-{uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(provenance, sort_keys=True))}", objects, files,
            {"@type": "CreateAction", "name": f"Run at scale {config['scale']}", "startTime": _moment(begun),
             "endTime": _moment(ended), "actionStatus": "http://schema.org/CompletedActionStatus",
             "description": f"snakemake --cores all, with config.yaml of this crate; on {machine}; seeds "
                            f"{', '.join(map(str, provenance['seeds']))}"})
        crate.root_dataset["mentions"] = action

        temporary = Path(tempfile.mkdtemp(prefix=".crate-", dir=folder.parent))
        try:
            crate.write(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return read_json(folder / "ro-crate-metadata.json")


def check_crate(folder: str | Path) -> list[str]:
    """What is wrong with a crate: the essentials of the profile, and every checksum; empty if nothing is."""
    folder, wrong = Path(folder), []
    try:
        document = read_json(folder / "ro-crate-metadata.json")
        graph = {entity["@id"]: entity for entity in document["@graph"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"ro-crate-metadata.json cannot be read: {error}"]

    def many(value) -> list:
        return value if isinstance(value, list) else [] if value is None else [value]

    def links(entity: dict, key: str) -> list[str]:
        return [value["@id"] for value in many(entity.get(key)) if isinstance(value, dict)]

    top = graph.get("./", {})
    wrong += [f"the root does not conform to {profile}" for profile in PROFILES if profile not in links(top, "conformsTo")]
    main = graph.get((links(top, "mainEntity") or [""])[0], {})
    if "ComputationalWorkflow" not in many(main.get("@type")):
        wrong.append("mainEntity is no ComputationalWorkflow")
    actions = [entity for entity in graph.values() if entity["@type"] == "CreateAction"]
    if not [action for action in actions if links(action, "instrument") == links(top, "mainEntity")]:
        wrong.append("no CreateAction has the workflow as its instrument")
    for action in actions:
        wrong += [f"{action['@id']}: {key} is missing" for key in ("object", "result", "endTime") if not action.get(key)]
        if action["@id"] not in links(top, "mentions"):
            wrong.append(f"{action['@id']} is not mentioned by the root")
    for identifier, entity in graph.items():
        for key, value in entity.items():
            wrong += [f"{identifier}: {key} names {target}, which is not described" for item in many(value)
                      if isinstance(item, dict) and (target := item.get("@id", "")) not in graph
                      and not re.match(r"https?://", target)]
        if "File" not in many(entity["@type"]) or "sha256" not in entity:
            continue
        path = folder / unquote(identifier)
        if not path.is_file():
            wrong.append(f"{identifier} is not there")
        elif digest(path) != entity["sha256"] or str(path.stat().st_size) != entity["contentSize"]:
            wrong.append(f"{identifier} is not what the crate says: size or sha256 differ")
    return wrong
