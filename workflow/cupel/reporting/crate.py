"""A run as an RO-Crate: workflow, settings, inputs and results in one folder, described for machines.

Follows the Workflow Run Crate profile 0.5 (https://w3id.org/ro/wfrun/workflow/0.5) on RO-Crate 1.1: the workflow is the
main entity, its run a CreateAction with the settings and data sets as objects and the files of the report as results.
Every file stands there with its size and sha256; data sets and models are too large to be inside, and are named by the
checksum of their content.
"""

import datetime
import hashlib
import io
import json
import mimetypes
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

import yaml

from cupel.files import benchmarks, digest, read_json, scratch

PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": ("Process Run Crate", "0.5"),
    "https://w3id.org/ro/wfrun/workflow/0.5": ("Workflow Run Crate", "0.5"),
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": ("Workflow RO-Crate", "1.0"),
}
#: terms such as sha256 that RO-Crate itself does not define
TERMS = "https://w3id.org/ro/terms/workflow-run/context"
#: what of the repository travels beside the Snakefile
SOURCES = ("workflow", "profiles", "envs/constraints.txt", "docs/*.md", "pyproject.toml", "Makefile", "README.md", "LICENSE",
           "CITATION.cff")
TYPES = {".parquet": "application/vnd.apache.parquet", ".ipynb": "application/x-ipynb+json", ".md": "text/markdown",
         ".yaml": "application/yaml", ".smk": "text/x-python", ".tex": "application/x-tex", ".j2": "text/x-jinja2",
         ".toml": "application/toml", ".cff": "application/yaml"}
#: settings that are parameters of the workflow
PARAMETERS = ("scale", "papers", "seeds", "device")


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _sizes(manifest: dict) -> str:
    """Samples by split or part (images count them by class), or the parameters of a model."""
    counts = manifest.get("counts") or {"parameters": manifest["parameters"]}
    return ", ".join(f"{sum(number) if isinstance(number, list) else number} {part}" for part, number in counts.items())


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Files, and the files in folders, sorted, each once; hidden ones, and what Python and pip leave, are left out."""
    found = set()
    for path in map(Path, paths):
        found |= {file for file in path.rglob("*") if file.is_file()} if path.is_dir() else {path}
    return sorted(file for file in found
                  if not file.name.startswith(".") and file.parent.name != "__pycache__" and file.parent.suffix != ".egg-info")


def period(folder: str | Path, results: Iterable[Path]) -> tuple[float, float]:
    """Beginning of the first job and end of the last, seconds since 1970, of the benchmark files in a folder.

    Jobs of several runs count as one: a benchmark file is written when its job ends, and says how long it took.
    """
    begun = [file.stat().st_mtime - float(row["s"]) for file, row in benchmarks(folder)]
    ended = max(file.stat().st_mtime for file in results)
    return min([*begun, ended]), ended


def write_crate(folder: str | Path, *, root: str | Path, config: dict, results: Iterable[str | Path], base: str | Path,
                provenance: dict, manifests: Iterable[str | Path], papers: Iterable[dict], benchmarks: str | Path) -> dict:
    """Write the crate of a run, and return what its `ro-crate-metadata.json` says.

    Args:
        folder: of the crate, complete or absent; replaced where there is one.
        root: of the repository.
        config: settings of the run, as `config.yaml` in the crate says them.
        results: files and folders below `base`, `results/<scale>`, that the run made.
        provenance: content of provenance.json.
        manifests: manifest.json of every data set.
        papers: dicts with `key`, `title`, `reference`.
        benchmarks: folder of benchmark files, for the times of the run.
    """
    from rocrate.rocrate import ROCrate

    folder, root, base = Path(folder), Path(root), Path(base)
    made = expand(results)
    begun, ended = period(benchmarks, made)
    versions = provenance["versions"]
    crate = ROCrate(version="1.1")
    crate.metadata.extra_contexts.append(TERMS)

    def entity(identifier: str, kind: str, /, **properties):
        return crate.add_jsonld({"@id": identifier, "@type": kind, **properties})

    def add(path: Path, place: str, method=crate.add_file, **more):
        kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
        facts = {"sha256": digest(path)} | ({"encodingFormat": kind} if kind else {})
        return method(path, place, record_size=True, properties=facts, **more)

    licence = entity("https://spdx.org/licenses/MIT", "CreativeWork", name="MIT License", identifier="MIT",
                     url="https://spdx.org/licenses/MIT")
    authors = entity("#authors", "Organization", name="The Cupel authors")
    titles = [f"{paper['title']} ({paper['reference']})" for paper in papers]
    crate.name = f"Cupel, scale {config['scale']}: {', '.join(config['papers'])}"
    crate.description = ("A run of the Cupel workflow: settings, provenance, tidy table of all cells, tables, figures and "
                         f"verdicts on the claims of: {'; '.join(titles)}. The licence is of the workflow; data sets have "
                         "their own.")
    crate.license, crate.datePublished = licence, _moment(ended)
    crate.root_dataset["author"] = authors
    crate.root_dataset["conformsTo"] = [entity(identifier, "CreativeWork", name=name, version=version)
                                        for identifier, (name, version) in PROFILES.items()]

    main = add(root / "Snakefile", "Snakefile", crate.add_workflow, main=True, lang="snakemake",
               lang_version=versions.get("snakemake"))
    main["name"] = "Cupel: five papers on removing backdoors and on robustness, in one workflow"
    main["encodingFormat"] = "text/x-python"
    main["version"], main["license"], main["author"] = provenance["commit"], licence, authors
    main["softwareRequirements"] = [entity(f"#{name}", "SoftwareApplication", name=name, softwareVersion=version)
                                    for name, version in versions.items() if name not in ("system", "gpu")]
    main["conformsTo"] = entity("https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE", "CreativeWork",
                                name="ComputationalWorkflow profile", version="1.0-RELEASE")
    main["hasPart"] = [add(path, path.relative_to(root).as_posix())
                       for path in expand(path for name in SOURCES for path in root.glob(name))]
    if "README.md" in crate:
        crate.get("README.md")["about"] = crate.root_dataset

    settings = yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False)
    objects = [crate.add_file(io.StringIO(settings), "config.yaml", record_size=True, properties={
        "name": "Settings of this run", "description": "All keys, with the defaults of those that were not set",
        "sha256": hashlib.sha256(settings.encode()).hexdigest(), "encodingFormat": TYPES[".yaml"]})]
    for name in PARAMETERS:
        parameter = crate.add_formal_parameter(name, "Text", f"#parameter-{name}", properties={"valueRequired": "False"})
        main.append_to("input", parameter)
        value = config.get(name)
        words = ", ".join(map(str, value)) if isinstance(value, list) else "of the scale" if value is None else str(value)
        objects.append(entity(f"#value-{name}", "PropertyValue", name=name, value=words, exampleOfWork=parameter))
    for manifest in map(read_json, manifests):
        source = manifest["source"]
        objects.append(entity(
            f"#data-{manifest['name']}", "CreativeWork", name=manifest["name"], sha256=manifest["content_sha256"],
            description=f"Prepared, {_sizes(manifest)}; sha256 of the content. From: " + ("; ".join(
                f"{file['origin']} ({file['checksum']})" for file in source.get("files", []))
                or source.get("repository", source["kind"])),
            usageInfo=manifest["licence"]))

    files = [add(path, f"results/{config['scale']}/{path.relative_to(base).as_posix()}") for path in made]
    machine = ", ".join(filter(None, [provenance.get("processor"), versions.get("gpu"), versions.get("system")]))
    crate.root_dataset["mentions"] = crate.add_action(
        main, f"#run-{uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(provenance, sort_keys=True))}", objects, files,
        {"name": f"Run at scale {config['scale']}", "startTime": _moment(begun), "endTime": _moment(ended),
         "actionStatus": "http://schema.org/CompletedActionStatus",
         "description": f"snakemake --cores all, with config.yaml of this crate; on {machine}; seeds "
                        f"{', '.join(map(str, provenance['seeds']))}"})

    with scratch(folder.parent, ".crate-") as temporary:
        crate.write(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.chmod(0o755)
        temporary.rename(folder)
    return read_json(folder / "ro-crate-metadata.json")


def check_crate(folder: str | Path) -> list[str]:
    """What is wrong with a crate: the essentials of the profile, and every checksum; empty if nothing is."""
    from rocrate.model import ComputationalWorkflow, Entity
    from rocrate.rocrate import ROCrate

    try:
        crate = ROCrate(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"ro-crate-metadata.json cannot be read: {error}"]

    def many(entity: Entity, key: str) -> list:
        value = entity.get(key, [])
        return value if isinstance(value, list) else [value]

    top, actions = crate.root_dataset, crate.get_by_type("CreateAction")
    wrong = [f"the root does not conform to {name}" for name in PROFILES if crate.get(name) not in many(top, "conformsTo")]
    if not isinstance(crate.mainEntity, ComputationalWorkflow):
        wrong.append("mainEntity is no ComputationalWorkflow")
    if not any(action.get("instrument") == crate.mainEntity for action in actions):
        wrong.append("no CreateAction has the workflow as its instrument")
    for action in actions:
        wrong += [f"{action.id}: {key} is missing" for key in ("object", "result", "endTime") if not action.get(key)]
        if action not in many(top, "mentions"):
            wrong.append(f"{action.id} is not mentioned by the root")
    for entity in crate.get_entities():
        for key, value in entity.as_jsonld().items():
            named = [item["@id"] for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
            wrong += [f"{entity.id}: {key} names {target}, which is not described" for target in named
                      if target not in crate and not target.startswith(("http://", "https://"))]
    for file in crate.data_entities:
        if not file.source.is_file():
            wrong.append(f"{file.id} is not there")
        elif digest(file.source) != file.get("sha256") or str(file.source.stat().st_size) != file.get("contentSize"):
            wrong.append(f"{file.id} is not what the crate says: size or sha256 differ")
    return wrong
