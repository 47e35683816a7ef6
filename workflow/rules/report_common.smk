# What reports, claims and pages are made from: the input and parameter functions of their rules.

import functools

from cupel.reporting.planning import feature_cells, notebook_file, report_file

PAPER = PATHS.paper()

# pictures that rules of a paper's own draw, by paper: dicts with path and caption. Its rules.smk adds them
PICTURES = {paper: [] for paper in GRID.papers}

# triggers that need no victim
FORMULAS = ("badnets", "blended", "sig", "lc", "bpp")


@functools.cache
def feature_figure(paper):
    """Panels of the figure of features, and what they are measured on; None where experiment.yaml asks for none, or
    where networks may be missing and all are."""
    asked = GRID.experiments[paper].get("features")
    if not asked:
        return None
    cells = feature_cells(GRID.cells("victim", paper), GRID.cells("purified", paper), asked["defences"])

    def needed(cell):
        return [f"{PATHS.cell(cell)}/model.safetensors", f"{VICTIM.format(**cell)}/trigger.npz"]

    cells = [(attack, title, cell) for attack, title, cell in cells if present(needed(cell)) == needed(cell)]
    if not cells:
        return None
    files = [needed(cell) for _, _, cell in cells]
    panels = [
        {
            "row": attack,
            "title": title,
            "model": here(model),
            "trigger": here(trigger),
            "attack": IMAGES.attack(cell["attack"], cell["dataset"]),
        }
        for (attack, title, cell), (model, trigger) in zip(cells, files, strict=True)
    ]
    first = cells[0][2]
    recipe = IMAGES.recipe(first)
    spec = {"panels": panels, "target": recipe.get("target", 0), "test_size": recipe.get("test_size")}
    looked_up = {IMAGES.code(kind, cell[kind]) for _, _, cell in cells for kind in ("attack", "model")}
    return {
        "spec": spec,
        "folder": here(f"{DATA}/images/{first['dataset']}"),
        "code": sorted(filter(None, looked_up)),
        "files": sum(files, []),
    }


def sheet_attacks(sheet, dataset):
    """Attacks of a contact sheet, name to settings and a victim's trigger: of the chosen papers, of the zoo, or, for any
    data set, those that are formulas."""
    if sheet == "gallery":
        return {name: (IMAGES.attack(name, dataset), None) for name in FORMULAS}
    victims = (ZOO if sheet == "zoo" else GRID).cells("victim", family="images")
    shown = [cell for cell in reversed(victims) if cell["attack"] != "clean" and cell["dataset"] == dataset]
    found = {cell["attack"]: present([f"{VICTIM.format(**cell)}/trigger.npz"]) for cell in shown}
    return {
        name: (IMAGES.attack(name, dataset), *(files or [None])) for name, files in found.items() if files or name in FORMULAS
    }


def sheet_code(wildcards):
    attacks = sheet_attacks(wildcards.sheet, wildcards.dataset)
    return code_digest(SCRIPTS / "contact_sheet.py", *sorted(IMAGES.code("attack", name) for name in attacks))


def used_manifests():
    """All data that the chosen papers use, with report.allow_missing as far as prepared: by its folder below that of all data,
    its manifest."""
    names = (name for family in GRID.families.values() for name in family.data())
    return {name: file for name in names for file in present([f"{DATA}/{name}/manifest.json"])}


def expected_cells():
    """Cells of every paper with their folders: one that two papers share stands in the table once for each."""
    return [
        {**cell, "folder": here(folder), "logs": here(BLOCK_LOGS.get(folder) or PATHS.log(folder, "*"))}
        for paper in GRID.papers
        for cell in GRID.of_paper(paper)
        for folder in [PATHS.cell(cell)]
    ]


def histories(paper=None):
    """The course of training of every cell that was trained."""
    return [f"{PATHS.cell(cell)}/history.csv" for cell in GRID.cells(paper=paper) if cell["stage"] != "attacked"]


@functools.cache
def report_of(paper):
    """Labels, facts and files by kind for the report of a paper."""
    family = GRID.family(paper)
    files = {kind: present(paths) for kind, paths in family.report_files(paper, PATHS).items()}
    return {"labels": family.report_labels(paper), "facts": family.facts(paper, PATHS), "files": files}


def paper_file(paper, name):
    """A file in a paper's folder, where there is one."""
    file = GRID.file(paper, name)
    return str(file) if file.is_file() else []


def page_pictures(paper):
    """Pictures of a paper that other rules draw, with their captions, in the order of the page."""
    text = (
        "Penultimate features (t-SNE): clean test images by class, triggered ones as crosses. The numbers: shares of a "
        "triggered image's ten nearest clean images that are of the target class, and of its true class."
    )
    features = [{"path": f"{PATHS.paper(paper)}/features.svg", "caption": text}] if feature_figure(paper) else []
    return features + PICTURES[paper]


def picture_tables(paper):
    """The numbers of the figure of features, which stand beside it."""
    return [f"{PATHS.paper(paper)}/features.csv"] if feature_figure(paper) else []


def registry(paper):
    """Names of all defences of a paper's family, also those that are not run: by these each has its colour."""
    return list(GRID.family(paper).labels("defences").values())


def paper_header(paper):
    """What pages say of a paper, and the files of its folder that they read."""
    return {
        "key": paper,
        "title": GRID.experiments[paper]["title"],
        "reference": GRID.experiments[paper].get("reference", ""),
        "note": GRID.experiments[paper]["scales"][config["scale"]].get("note", ""),
        "gate": GRID.gate(paper),
        "folder": here(PATHS.paper(paper)),
        "pictures": [{**picture, "path": here(picture["path"])} for picture in page_pictures(paper)],
        **{name: paper_file(paper, f"{name}.yaml") for name in ("card", "claims")},
    }


def known_entries():
    """What experiment.yaml says of everything that the cells name, by family: for the panels of cells."""
    found = {}
    for name, family in GRID.families.items():
        used = {key: set(family.used(key.removesuffix("s"))) for key in family.SECTIONS.values()}
        entries = {
            section: {entry: family.entries[section][entry] for entry in sorted(used[key] & family.entries[section].keys())}
            for section, key in family.SECTIONS.items()
        }
        found[name] = {"sections": dict(family.SECTIONS), "entries": entries}
    return found


def planned_budgets():
    """Budgets of the chosen papers on image classifiers, with the scales that run them."""
    found = {}
    for paper in GRID.papers_of("images"):
        for scale, content in GRID.experiments[paper]["scales"].items():
            for budget in {name for block in content["blocks"] for name in block.get("budgets", [])}:
                found.setdefault(budget, []).append(scale)
    return {name: sorted(set(scales) - {"smoke"}, key=SCALES.index) for name, scales in sorted(found.items())}


# what every page of the site must know of the others
SITE = {
    "scale": config["scale"],
    "papers": [{"key": paper} for paper in GRID.papers],
    "cross": bool(GRID.papers_of("images")),
    "compare": bool(config["report"]["compare"]),
}


def compared():
    """Folders of this run and of the one that it is compared with."""
    return [RESULTS, config["report"]["compare"] or RESULTS]


def comparison():
    """The page that compares this run with another, and its files, where it is asked for."""
    names = ("compare.html", "agreement.csv", "agreement.svg", "claims_agreement.csv")
    return [f"{RESULTS}/{name}" for name in names] if SITE["compare"] else []


def index_files(wildcards):
    """What the first page shows or leads to, beside the tidy table, by kind."""
    return {
        "cross": [f"{RESULTS}/cross.csv", f"{RESULTS}/cross.html", f"{RESULTS}/cross"] if SITE["cross"] else [],
        **{name: [f"{PATHS.paper(paper)}/{name}" for paper in GRID.papers] for name in ("tables", "figures")},
        "claims": [f"{PATHS.paper(paper)}/claims.csv" for paper in GRID.papers],
        "pictures": [picture["path"] for paper in GRID.papers for picture in page_pictures(paper)],
        "reports": [
            f"{PATHS.paper(paper)}/{name}" for paper in GRID.papers for name in ("report.html", "report.ipynb", "card.md")
        ],
        "pages": [f"{RESULTS}/cells.html"],
        "sheets": [f"{RESULTS}/figures/triggers_{dataset}.png" for dataset in sorted(IMAGES.used("dataset"))],
        "triggers": [f"{RESULTS}/figures/triggers_{dataset}" for dataset in sorted(IMAGES.used("dataset"))],
        "manifests": list(used_manifests().values()),
        "texts": local(
            [file for paper in GRID.papers for name in ("card", "claims") if (file := paper_file(paper, f"{name}.yaml"))]
        ),
    }


# a claims.yaml that is wrong ends the run before its first job
for paper in GRID.papers:
    checked(GRID.claims)(paper)
