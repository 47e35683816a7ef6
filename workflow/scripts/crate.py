from pathlib import Path

from cupel.files import read_json
from cupel.job import logged
from cupel.reporting.crate import check_crate, write_crate

with logged(snakemake.log[0]):
    base = Path(snakemake.output.crate).parent
    made = [path for path in (*snakemake.input.report, *snakemake.input.pages) if Path(path).is_relative_to(base)]
    write_crate(snakemake.output.crate, root=snakemake.params.root, config=snakemake.params.config, results=made, base=base,
                provenance=read_json(snakemake.input.provenance), manifests=snakemake.input.manifests,
                papers=snakemake.params.papers, benchmarks=snakemake.params.benchmarks)
    if wrong := check_crate(snakemake.output.crate):
        raise RuntimeError("the crate is not in order: " + "; ".join(wrong))
    files = [path for path in Path(snakemake.output.crate).rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB")
