# What reports, claims and pages are made from: what planners say, and the input and parameter functions of the rules.

from cupel.reporting.planning import feature_cells, notebook_file, report_file

PAPER = f"{RESULTS}/papers/{{paper}}"

# pictures that rules of a paper's own draw, by paper: dicts with path and caption. Its rules.smk adds them
PICTURES = {paper: [] for paper in GRID.papers}


# ---------------------------------------------------------------- what planners say to reports; nothing below asks them


def image_report(paper):
    purified = GRID.cells("purified", paper)
    known, used = GRID.entries["defences"], dict.fromkeys(cell["defence"] for cell in purified)
    entries = {name: known.get(name, {}) for name in [*known, *used] if name in used}
    settings = dict.fromkeys((cell["defence"], cell["dataset"]) for cell in purified)
    return {
        "labels": {"defences": {name: entry.get("label", name) for name, entry in entries.items()}},
        "facts": {
            "kinds": {name: entry.get("kind", "") for name, entry in entries.items()},
            "defences": {name: GRID.defence(name, dataset) for name, dataset in settings},
        },
        "files": {"histories": files_beside("history.csv", paper=paper, stage="victim")},
    }


def language_report(paper):
    grid = LANGUAGE[paper]
    return {
        "labels": {section: grid.labels(section) for section in ("defences", "attacks", "models")},
        "facts": {"manifests": {name: f"{DATA}/{name}/manifest.json" for name in FAMILY_DATA[paper]}},
        "files": {"records": cell_files(paper=paper)},
    }


def multimodal_report(paper):
    plan, labels = MULTIMODAL[paper], {section: MULTIMODAL[paper].labels(section) for section in ("defences", "attacks")}
    datasets = {name: f"{DATA}/{name}" for name in plan.used("dataset")}
    bases = [f"{BASE}/base.json".format(**cell) for cell in FAMILY_CELLS[paper] if cell["model"] in plan.built()]
    return {
        "labels": labels,
        "facts": {
            "attacks": {name: plan.attack(name) for name in labels["attacks"]},
            "datasets": datasets,
            "target": plan.target,
        },
        "files": {
            "filters": files_beside("filters.json", paper=paper, stage="filtered"),
            "bases": wanted(dict.fromkeys(bases)),
            "manifests": [f"{folder}/manifest.json" for folder in datasets.values()],
        },
    }


def interpretability_report(paper):
    return {
        "labels": {"methods": PLANS[paper].labels()},
        "facts": PLANS[paper].facts(),
        "files": {"arrays": files_beside("evaluation.npz", paper=paper, stage="attacked")},
    }


def feature_figure(paper):
    """Panels of the figure of features, and what they are measured on; None where experiment.yaml asks for none."""
    asked = GRID.experiments[paper].get("features")
    if not asked:
        return None
    cells = feature_cells(GRID.cells("victim", paper), GRID.cells("purified", paper), asked["defences"])
    recipe = GRID.recipe(cells[0][2]["recipe"], cells[0][2]["dataset"])
    panels = [
        {
            "row": attack,
            "title": title,
            "model": f"{cell_folder(cell)}/model.safetensors",
            "trigger": f"{VICTIM.format(**cell)}/trigger.npz",
            "attack": attack_spec(Cell(**cell)),
        }
        for attack, title, cell in cells
    ]
    spec = {"panels": panels, "target": recipe.get("target", 0), "test_size": recipe.get("test_size")}
    return {"spec": spec, "folder": f"{DATA}/{cells[0][2]['dataset']}"}


def sheet_attacks(sheet, dataset):
    """Attacks of a contact sheet, name to settings and a victim's trigger: of the chosen papers, of the zoo, or, for any
    data set, those that are formulas."""
    if sheet == "gallery":
        return {name: (attack_spec(Cell(attack=name, dataset=dataset)), None) for name in FORMULAS}
    victims = (ZOO if sheet == "zoo" else GRID).cells("victim")
    shown = [cell for cell in reversed(victims) if cell["attack"] != "clean" and cell["dataset"] == dataset]
    folders = {cell["attack"]: VICTIM.format(**cell) for cell in shown}
    return {
        name: (attack_spec(Cell(attack=name, dataset=dataset)), f"{folder}/trigger.npz") for name, folder in folders.items()
    }


def sheet_code(sheet):
    return code_digest(SCRIPTS / "contact_sheet.py", *map(str, (GRID if sheet == "figures" else ZOO).attack_files()))


def used_seeds():
    return sorted({int(cell["seed"]) for cell in [*GRID.cells(), *family_cells()]})


def used_manifests():
    names = {*used_datasets(), *(name for names in FAMILY_DATA.values() for name in names)}
    return {name: f"{DATA}/{name}/manifest.json" for name in sorted(names)}


REPORTS = {
    "image": image_report,
    "language": language_report,
    "multimodal": multimodal_report,
    "interpretability": interpretability_report,
}

# ------------------------------------------------------------------------------------------------- end of the planners' part

# triggers that need no victim
FORMULAS = ("badnets", "blended", "sig", "lc", "bpp")


def wanted(files):
    """Files of a report; with report.allow_missing only those that exist."""
    return [file for file in files if os.path.exists(file)] if config["report"]["allow_missing"] else list(files)


def files_beside(name, **cells):
    """Files of this name beside the metrics.json of cells."""
    return wanted(file.replace("metrics.json", name) for file in cell_files(**cells))


@functools.cache
def report_of(paper):
    """Labels, facts and files by kind for the report of a paper."""
    return REPORTS[GRID.family(paper)](paper)


def report_key(paper):
    """The paper whose report.py draws this one."""
    return GRID.experiments[paper].get("report", paper)


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
    features = [{"path": f"{RESULTS}/papers/{paper}/features.png", "caption": text}] if feature_figure(paper) else []
    return features + PICTURES[paper]


def paper_headers():
    return [
        {
            "key": paper,
            "title": GRID.experiments[paper]["title"],
            "reference": GRID.experiments[paper].get("reference", ""),
            "note": GRID.experiments[paper]["scales"].get(config["scale"], {}).get("note", ""),
            "folder": f"{RESULTS}/papers/{paper}",
            "pictures": page_pictures(paper),
        }
        for paper in GRID.papers
    ]


def check_claims():
    """A claims.yaml that is wrong ends the run before its first job."""
    for paper in GRID.papers:
        if file := paper_file(paper, "claims.yaml"):
            check_schema(read_yaml(file), "claims", file)


checked(check_claims)
