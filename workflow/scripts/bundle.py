"""Wheels of another machine's Python, and the bundle itself."""

from pathlib import Path

from cupel import bundle
from cupel.job import logged
from cupel.reporting.provenance import git_commit, versions

with logged(snakemake.log[0]):
    settings = snakemake.params.settings
    if snakemake.rule == "download_wheels":
        wheels = bundle.download_wheels(snakemake.output.wheels, pyproject=snakemake.input.pyproject,
                                        constraints=snakemake.input.constraints, **settings)
        print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.1f} MiB")
    else:
        carried = [bundle.Entry(path, Path(source), kind)
                   for kind, files in (("data", snakemake.params.data), ("weights", snakemake.params.victims))
                   for path, source in files.items()]
        carried += [bundle.Entry(f"plugins/{Path(path).name}", Path(path), "source") for path in snakemake.input.plugins]
        wheels = sorted(Path(settings["folder"], "wheels").glob("*.whl")) if settings["wheels"] else []
        facts = {"commit": git_commit(snakemake.params.root), "versions": versions(),
                 "wheels": {key: settings[key] for key in ("python", "platforms", "skip")} if wheels else None}
        manifest = bundle.make(Path(snakemake.output.manifest).parent, root=snakemake.params.root, scale=snakemake.params.scale,
                               config=snakemake.params.config, carried=carried, wheels=wheels,
                               part_bytes=int(settings["part_mb"] * 2**20), facts=facts)
        size = sum(part["size"] for part in manifest["parts"]) / 2**20
        print(f"{len(manifest['files'])} files in {len(manifest['parts'])} parts, {size:.1f} MiB; "
              f"sha256 of the manifest's content {manifest['sha256']}")
