"""What the experiment files ask for: cells, overlays, refusals; one planner for all families."""

import shutil

import pytest
import yaml

from cupel.experiment import FAMILIES, SCALES, Grid, overlaid
from cupel.paths import STAGES, Paths
from cupel.settings import PAPERS, ConfigError, check_schema, read_yaml, schema, typed

ALL = ["fst", "ims", "ims_inner_step", "breadth", "zoo", "bye", "crow", "crow_breadth", "proper_interpretability",
       "proper_interpretability_breadth"]


@pytest.fixture
def folder(tmp_path):
    """A copy of the papers' settings that a test may spoil."""
    shutil.copytree(PAPERS, tmp_path / "papers", ignore=shutil.ignore_patterns("*.ipynb", "*.md", "reported", "*.py"))
    return tmp_path / "papers"


def edit(file, change):
    content = read_yaml(file)
    change(content)
    file.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize("scale", SCALES)
def test_every_paper_plans_at_every_scale(scale):
    papers = [paper for paper in ALL if scale in read_yaml(PAPERS / paper / "experiment.yaml")["scales"]]
    grid = Grid(papers, scale)
    breadth = {"breadth", "crow_breadth", "proper_interpretability_breadth"}
    lacking = {"desk": set(), "paper": {"ims_inner_step", *breadth}, "demo": {"ims_inner_step", *breadth}}
    assert set(ALL) - set(papers) == lacking.get(scale, breadth)
    for paper in papers:
        assert grid.cells(paper=paper) == grid.of_paper(paper) or paper in ("ims", "ims_inner_step", *breadth)
    paths = Paths("results", scale, "data")
    folders = [paths.cell(cell) for cell in grid.cells()]
    assert len(set(folders)) == len(folders), "every cell has a folder of its own"
    assert all(path.startswith(f"results/{scale}/{cell['family']}/") for path, cell in zip(folders, grid.cells(), strict=True))


def test_a_page_apart_has_the_gate_of_the_paper_whose_report_it_has():
    grid = Grid(["crow", "crow_breadth", "breadth"], "desk")
    assert grid.gate("crow_breadth") == grid.gate("crow") == grid.claims("crow")["gate"]
    assert grid.gate("breadth") == {}


def test_no_path_is_of_two_families():
    assert set(STAGES) == set(FAMILIES)
    paths = Paths("results", "demo", "data")
    assert all(paths.stage(family, stage).split("/")[2] == family for family, stages in STAGES.items() for stage in stages)


def test_ims_has_its_288_victims():
    cells = Grid(["ims"], "paper").cells("victim")
    assert len(cells) == 288
    assert len({(c["dataset"], c["model"], c["attack"].partition("~")[0], c["rate"]) for c in cells}) == 288
    assert all(c["attack"] == "sig~dirty" for c in cells if c["attack"].startswith("sig") and c["dataset"] != "cifar10")


def test_papers_share_victims_by_recipe():
    both = Grid(["fst", "ims"], "demo").cells("victim")
    alone = [len(Grid([paper], "demo").cells("victim")) for paper in ("fst", "ims")]
    assert len(both) == max(alone) < sum(alone)


def test_defences_of_the_clean_twin_stand_at_rate_0():
    cells = [cell for cell in Grid(["fst"], "bench").cells() if cell["attack"] == "clean"]
    assert {cell["rate"] for cell in cells} == {"0"} and [cell["stage"] for cell in cells].count("victim") == 1
    assert {cell["defence"] for cell in cells if cell["stage"] == "purified"} == {"lp", "ft", "fe_tuning", "ft_init", "fst"}


def test_settings_are_overlaid_for_data_set_then_model_then_scale():
    entry = {"settings": {"a": 1, "part": {"x": 1, "y": 1}}, "datasets": {"d": {"part": {"y": 2}}},
             "models": {"m": {"part": {"y": 3, "z": 3}}}, "scales": {"demo": {"a": 4}}}
    assert overlaid(entry) == entry["settings"]
    assert overlaid(entry, dataset="d", model="other", scale="smoke") == {"a": 1, "part": {"x": 1, "y": 2}}
    assert overlaid(entry, dataset="d", model="m", scale="demo") == {"a": 4, "part": {"x": 1, "y": 3, "z": 3}}
    assert entry["settings"]["part"] == {"x": 1, "y": 1}, "the entry is left as it was"
    images = Grid(["fst"], "bench").families["images"]
    cell = {"model": "resnet18", "recipe": "fst", "attack": "badnets"}
    cifar10, gtsrb = ({**cell, "dataset": name} for name in ("cifar10", "gtsrb"))
    usual = images.settings("defences", "fst", cifar10)
    assert images.settings("defences", "fst", gtsrb) == {**usual, "epochs": 15, "alpha": 0.1}
    assert images.recipe(gtsrb)["training"]["epochs"] == 50 and images.recipe(gtsrb)["training"]["t_max"] == 100


def test_what_an_attack_changes_in_the_training():
    for scale, recipe, epochs in (("paper", "ims", 75), ("desk", "fst", 16)):
        cell = {"dataset": "cifar10", "model": "preactresnet18", "recipe": recipe, "attack": "inputaware"}
        training = Grid([], scale).families["images"].recipe(cell)["training"]
        assert training["epochs"] == epochs and not training["drop_last"]


def test_every_setting_has_a_source():
    for file in sorted(PAPERS.glob("*/*.yaml")):
        content = read_yaml(file)
        sections = schema(content.get("family", "experiment")).get("sections", {})
        for section in set(content) & set(sections):
            for name, entry in content[section].items():
                assert entry["source"].strip(), f"{file}: {section}.{name}"


@pytest.mark.parametrize("family, section", [("images", "defences"), ("robust", "recipes"), ("text", "defences"),
                                             ("vision_language", "models")])
def test_one_name_one_meaning_in_every_family(folder, family, section):
    """Two papers that define a name otherwise would share results by accident."""
    first = next(paper for paper in ALL if read_yaml(folder / paper / "experiment.yaml")["family"] == family)
    shutil.copytree(folder / first, folder / "another")
    Grid(["another"], "smoke", folder=folder)

    def change(content):
        next(iter(content[section].values()))["label" if section == "defences" else "source"] = "other"

    edit(folder / "another" / "experiment.yaml", change)
    with pytest.raises(ConfigError, match=rf"{section}\.\w+ is defined otherwise in .*experiment.yaml"):
        Grid([first], "smoke", folder=folder)


@pytest.mark.parametrize("paper, change, said", [
    ("fst", lambda e: e.update(family="audio"), r"family: unknown family 'audio': known are images"),
    ("fst", lambda e: e["defences"]["fst"]["settings"].update(alpa=1),
     r"experiment.yaml: defences.fst.settings: .*did you mean 'alpha'"),
    ("fst", lambda e: e["scales"]["demo"]["blocks"][0].update(attacks=["badnet"]),
     r"scales.demo.blocks.0.attacks: unknown attack 'badnet'.*did you mean 'badnets'"),
    ("fst", lambda e: e["scales"]["demo"]["blocks"][0].update(datasets=["cifar"]),
     r"blocks.0.datasets: unknown dataset 'cifar'"),
    ("fst", lambda e: e["scales"]["demo"].update(seed=[1]), r"scales.demo: unknown key 'seed'.*did you mean 'seeds'"),
    ("ims", lambda e: e["defences"]["clp"].update(function="clip"), r"defences.clp.function: unknown defence 'clip'"),
    ("crow", lambda e: e["attacks"]["vpi"].update(function="vpj"), r"attacks.vpi.function: unknown attack 'vpj'"),
    ("crow", lambda e: e["scales"]["demo"]["blocks"][0].update(budgets=[]),
     r"blocks.0.budgets: defences need at least one budget"),
    ("bye", lambda e: e["defences"]["oracle"]["settings"].update(recall=2),
     r"defences.oracle.settings.recall: 2 is out of range: it must be at most 1"),
    ("bye", lambda e: e["models"]["desk_llava"].pop("pretraining"), r"models.desk_llava: .*give pretraining"),
    ("proper_interpretability", lambda e: e["defences"]["adv"].update(settings={"weight": 1}), r"defences.adv.settings.weight"),
    ("proper_interpretability", lambda e: e["recipes"]["main"]["datasets"]["mnist"]["inner"].update(eps="1/0"),
     r"recipes.main.datasets.mnist.inner.eps: '1/0' is not a number"),
])
def test_wrong_settings_name_file_key_and_what_is_allowed(folder, paper, change, said):
    edit(folder / paper / "experiment.yaml", change)
    with pytest.raises(ConfigError, match=said) as error:
        Grid([paper], "demo", folder=folder)
    assert paper in str(error.value)


def test_wrong_papers_and_plugins():
    with pytest.raises(ConfigError, match=r"config.yaml: papers: unknown paper 'fts'.*did you mean 'fst'"):
        Grid(["fts"], "demo")
    with pytest.raises(ConfigError, match=r"scale: ims_inner_step has no scale 'paper'; it has smoke, desk, bench"):
        Grid(["ims_inner_step"], "paper")
    with pytest.raises(ConfigError, match=r"config.yaml: plugins: no such file: nowhere.py"):
        Grid(["fst"], "demo", plugins=["nowhere.py"])


def test_command_line_strings_become_what_the_schema_asks_for():
    form = schema("config")
    found = typed({"seeds": ["0", "2"], "report": {"allow_missing": "true"}, "scale": "demo", "data": {"mirror": "/1"}}, form)
    assert found == {"seeds": [0, 2], "report": {"allow_missing": True}, "scale": "demo", "data": {"mirror": "/1"}}
    assert typed({"seeds": ["x"]}, form) == {"seeds": ["x"]}


@pytest.mark.parametrize("change, texts", [
    ({"scael": "demo"}, ["config.yaml: unknown key 'scael'", "did you mean 'scale'?"]),
    ({"papers": []}, ["config.yaml: papers"]),
    ({"seeds": [-1]}, ["config.yaml: seeds.0", "at least 0"]),
    ({"seeds": "all"}, ["config.yaml: seeds", "should be of type array"]),
    ({"device": "gpu"}, ["config.yaml: device: 'gpu'", "auto, cpu, cuda"]),
    ({"data": {"sources": ["web"]}}, ["config.yaml: data.sources.0: 'web'", "official, hub, package, mirror"]),
    ({"data": {"mirrors": "/x"}}, ["config.yaml: data: unknown key 'mirrors'", "did you mean 'mirror'?"]),
], ids=lambda value: str(value)[:30])
def test_wrong_config(change, texts):
    with pytest.raises(ConfigError) as error:
        check_schema(typed({"scale": "demo", "papers": ["fst"], **change}, schema("config")), schema("config"), "config.yaml")
    assert all(text in str(error.value) for text in texts)


def test_scales_are_the_same_everywhere():
    assert tuple(schema("config")["properties"]["scale"]["enum"]) == SCALES


def test_blocks_hold_every_purified_cell_once():
    grid = Grid(["fst", "ims", "ims_inner_step"], "desk")
    blocks = grid.blocks()
    cells = [tuple(sorted((k, v) for k, v in cell.items() if k != "paper")) for block in blocks for cell in block]
    assert len(cells) == len(set(cells)) == len(grid.cells("purified"))
    assert all(len({cell["attack"] + cell["rate"] for cell in block}) == 1 for block in blocks)
    # what is asked for first is not moved by what is asked for besides
    assert [block for block in blocks if block[0]["paper"] == "fst"] == Grid(["fst"], "desk").blocks()
    assert not Grid(["fst"], "desk", jobs="cell").blocks()


def test_the_paper_scale_has_one_purifying_job_for_each_victim():
    """Snakemake takes 6 ms to plan a job: as many jobs as cells would take two minutes before anything runs."""
    grid = Grid(["fst", "ims"], "paper")
    assert len(grid.blocks()) == 288 + 30
    assert sum(map(len, grid.blocks())) == len(grid.cells("purified")) == 18330


def test_references_of_a_defence_are_cells():
    grid = Grid(["crow"], "bench")
    victims = {(cell["dataset"], cell["attack"], cell["seed"]) for cell in grid.cells("victim")}
    other = [cell for cell in grid.cells("purified") if cell["defence"] == "cleangen~other"]
    references = [grid.families["text"].reference(cell) for cell in other]
    assert other and {(cell["dataset"], cell["attack"], cell["seed"]) for cell in references} <= victims


def victims(**changes):
    """The victims of FST's demo, with another block."""
    def change(experiment):
        experiment["scales"]["demo"]["blocks"] = [{**experiment["scales"]["demo"]["blocks"][0], **changes}]
    return change


@pytest.mark.parametrize("change, said", [
    (victims(attacks=["sig"], rates=[0.2]),
     r"attack sig poisons the target class alone, and class 0 is 0.1 of cifar10: rate 0.2"),
    (victims(attacks=["lc"], rates=[0.05], datasets=["gtsrb"]),
     r"attack lc .*class 0 is 0.0\d+ of gtsrb: rate 0.05 is impossible"),
    (lambda e: e["recipes"]["fst"]["settings"].update(target=10), r"recipe fst: target 10, but cifar10 has the classes 0 to 9"),
], ids=["sig", "lc", "target"])
def test_what_a_class_cannot_give_is_refused(folder, change, said):
    edit(folder / "fst" / "experiment.yaml", change)
    with pytest.raises(ConfigError, match=said):
        Grid(["fst"], "demo", folder=folder)


def test_what_a_class_can_give_is_planned(folder):
    edit(folder / "fst" / "experiment.yaml", victims(attacks=["sig", "sig~dirty", "sig~capped"], rates=[0.1]))
    assert Grid(["fst"], "demo", folder=folder).cells("victim")
    edit(folder / "fst" / "experiment.yaml", victims(attacks=["sig~dirty", "sig~capped", "badnets"], rates=[0.5]))
    assert Grid(["fst"], "demo", folder=folder).cells("victim")
