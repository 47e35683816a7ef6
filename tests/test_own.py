"""A network that the library does not know, from its file to a purified one in its own form."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import cupel
from cupel import cells, digest, files, locks
from cupel.compat import ensure_torchvision
from cupel.images import datasets, models
from cupel.images.defences import DEFENCES
from cupel.own import cli, data, grid, imports, language, network, normalisations, run, suspect
from cupel.registry import load_plugins, module
from cupel.settings import ConfigError
from cupel.training.engine import Diverged, Recipe, fit
from tests.conftest import REPOSITORY
from tests.test_defences_resume import FEW
from tests.test_workflow import Folder

#: as people write them: not in the library's order of memory, and with a name that is nowhere in the library
NET = '''
from torch import nn


class Plain(nn.Module):
    def __init__(self, width=8, num_classes=10):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width)
        self.c2, self.b2 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width)
        self.act = nn.ReLU()
        self.hidden = nn.Linear(2 * width * 49, 64)
        self.out = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.act(self.b2(self.c2(self.act(self.b1(self.c1(x))))))
        return self.out(self.act(self.hidden(x.view(x.size(0), -1))))
'''
TRIGGER = '''
def stamp(images):
    images[:, -4:, -4:] = 255
    return images
'''
TARGET = 5


class Case:
    """Files of a user: network, trigger, checkpoint with a backdoor, clean images."""

    def __init__(self, folder, mnist):
        self.folder, self.net, self.trigger = folder, folder / "their_net.py", folder / "their_trigger.py"
        self.net.write_text(NET)
        self.trigger.write_text(TRIGGER)
        train, test = (datasets.load(mnist, split) for split in ("train", "test"))
        images, labels = np.array(train.images[:4000]), train.labels[:4000].copy()
        images[:400], labels[:400] = module(self.trigger).stamp(images[:400].copy()), TARGET
        torch.manual_seed(0)
        self.network = module(self.net).Plain()
        wrapped = network.wrap(self.network, torch.rand(2, 1, 28, 28), (0.1307,), (0.3081,))
        fit(wrapped, images, labels, Recipe(epochs=3, lr=0.05, crop=0, flip=False, schedule="constant"), seed=0)
        self.checkpoint = folder / "their_model.pth"
        state = {f"module.{key}": value for key, value in self.network.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state, "acc": 0.97}, self.checkpoint)
        self.clean = folder / "clean.npz"
        np.savez(self.clean, images=test.images[:1000], labels=test.labels[:1000])
        self.test = test.images[5000:7000], test.labels[5000:7000]

    def command(self, *more, out="out"):
        return ["purify", str(self.checkpoint), "--arch", f"{self.net}:Plain", "--normalize", "mnist",
                "--clean", str(self.clean), "--no-flip", "--crop", "2", "--out", str(self.folder / out), *more]

    def rates(self, network):
        """ACC and ASR by the user's own code, on images that the command never saw."""
        def predicted(images):
            x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
            with torch.no_grad():
                return network.eval()((x - 0.1307) / 0.3081).argmax(1).numpy()

        images, labels = self.test
        others = images[labels != TARGET].copy()
        return (predicted(images) == labels).mean(), (predicted(module(self.trigger).stamp(others)) == TARGET).mean()


@pytest.fixture(scope="module")
def case(tmp_path_factory, mnist):
    return Case(tmp_path_factory.mktemp("own"), mnist)


def test_one_command_from_a_backdoored_file_to_a_purified_one(case, capsys):
    settings = ["--trigger", f"{case.trigger}:stamp", "--target", "5", "--defences", "clp,fp",
                "--set", "fp.epochs=5"]
    assert cli.main(case.command(*settings)) == 0
    said = capsys.readouterr()
    assert "ACC on 1000 clean images: 9" in said.err and "500 images are tuned on, 500 others measure" in said.err
    before = case.rates(case.network)
    assert before[0] > 0.9 and before[1] > 0.95
    table = pd.read_csv(case.folder / "out" / "results.csv", index_col="defence")
    best = table.asr.drop("none").idxmin()
    outside = module(case.net).Plain()
    written = torch.load(case.folder / "out" / table.file[best], weights_only=True)
    assert written["epoch"] == 3 and list(written["state_dict"]) == [f"module.{key}" for key in outside.state_dict()]
    outside.load_state_dict({key.removeprefix("module."): value for key, value in written["state_dict"].items()}, strict=True)
    after = case.rates(outside)
    print(table[["acc", "asr", "result"]], before, after)
    assert after[1] < 0.2 and after[0] > before[0] - 0.05
    page = (case.folder / "out" / "index.html").read_text()
    assert f'href="{table.file[best]}"' in page and "ASR" in page and not (case.folder / "out" / "work").exists()


def test_from_a_notebook_with_evidence_and_defences_that_cannot(case, tmp_path, capsys):
    with np.load(case.clean) as file:
        images, labels = file["images"][:400], file["labels"][:400]
    before = {key: value.clone() for key, value in case.network.state_dict().items()}
    settings = {"ims": {"rounds_initial": 1, "rounds_minimise": 1, "steps_perturb": 1}, "mm_bd": {"epochs": 1}}
    found = cupel.purify(case.network, images, labels, mean=(0.1307,), std=(0.3081,), flip=False, evidence=("mm_bd",),
                         defences=("ims", "mm_bd", "npd"), settings=settings, out=tmp_path / "out")
    results = found.table.set_index("defence").result
    assert results["npd"].startswith("failed: npd knows no place") and "no checkpoint" in results["mm_bd"]
    assert set(found.networks) == {"ims"} and type(found.networks["ims"]).__name__ == "Plain"
    assert "asr" not in found.table and found.table.agreement[0] == 1
    assert all(torch.equal(value, before[key]) for key, value in case.network.state_dict().items())
    assert len(found.evidence["mm_bd"]["rows"]) == 10 and 0 <= found.evidence["mm_bd"]["p"] <= 1
    assert "Evidence, not a verdict" in found.page.read_text()
    assert "no clean image" not in capsys.readouterr().err


def test_every_defence_with_three_images_a_class_and_one_class_missing(case, capsys):
    with np.load(case.clean) as file:
        few = np.concatenate([np.flatnonzero(file["labels"] == c)[:6] for c in range(9)])
        images, labels = file["images"][few], file["labels"][few]
    found = cupel.purify(case.network, images, labels, mean=(0.1307,), std=(0.3081,), flip=False, evidence=(), settings=FEW,
                         trigger=module(case.trigger).stamp, target=TARGET, defences=tuple(FEW))
    failed = found.table[found.table.result.str.startswith("failed")].set_index("defence").result
    assert set(failed.index) == {"ims_vit", "npd"}, failed.to_dict()
    assert all("network has none" in text or "knows no place" in text for text in failed)
    assert len(found.networks) == len(FEW) - 3 and (found.table.asr_n.dropna() == 24).all()
    assert "no clean image is of the classes 9" in capsys.readouterr().err


GRID = """
models:
  first: &first
    checkpoint: their_model.pth
    arch: their_net.py:Plain
    normalize: mnist
    clean: clean.npz
    flip: false
    crop: 2
    trigger: their_trigger.py:stamp
    target: 5
  again: {<<: *first, checkpoint: net.pt}
defences:
  clp: {}
  fp~few: {epochs: 1, step: 0.5}
  npd: {}
budgets: [all, spc3]
"""


@pytest.fixture
def gridded(case, tmp_path, monkeypatch):
    """A folder in which GRID can be run."""
    for file in (case.net, case.trigger, case.checkpoint, case.clean):
        shutil.copy(file, tmp_path)
    torch.save({"net": case.network.state_dict()}, tmp_path / "net.pt")
    (tmp_path / "mine.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_grid_says_what_the_command_says(case, gridded):
    asked, top = grid.Grid("mine.yaml"), gridded / "out"
    assert asked.studies == [{"model": model, "budget": budget, "seed": "0"} for model in ("first", "again")
                             for budget in ("all", "spc3")]
    for study in asked.studies:
        out, spec = top / grid.folder(study), asked.study(**study)
        grid.look(spec, out, "cpu")
        for defence in asked.defences.items():
            grid.purify(spec, defence, out, "cpu")
        grid.report(out, asked.defences)
    grid.gather(top, asked.studies)
    table = pd.read_csv(top / "results.csv")
    assert len(table) == 16 and table.groupby(["model", "budget", "seed"]).size().tolist() == [4] * 4
    assert table[table.defence == "npd"].result.str.startswith("failed: npd knows no place").all()
    assert 'href="first/spc3/seed0/index.html"' in (page := (top / "index.html").read_text())
    assert 'href="again/all/seed0/purified_fp~few.pt"' in page
    study = top / "first" / "spc3" / "seed0"
    outside = module(case.net).Plain()
    written = torch.load(study / "purified_fp~few.pth", weights_only=True)["state_dict"]
    outside.load_state_dict({key.removeprefix("module."): value for key, value in written.items()}, strict=True)
    assert (study / "history_fp~few.csv").is_file() and not list(study.glob("work/*"))
    assert "fp~few.epochs = 1" in (study / "index.html").read_text()

    given = case.command("--trigger", f"{case.trigger}:stamp", "--target", "5", "--defences", "clp,npd,fp", "--spc", "3",
                         "--set", "fp.epochs=1", "--set", "fp.step=0.5", out="alone")
    assert cli.main(given) == 0
    alone = pd.read_csv(case.folder / "alone" / "results.csv", index_col="defence").rename({"fp": "fp~few"})
    made = pd.read_csv(study / "results.csv", index_col="defence")
    columns = ["acc", "acc_n", "asr", "asr_n", "ra", "agreement", "result"]
    pd.testing.assert_frame_equal(alone.loc[made.index, columns], made[columns])


def test_what_a_study_depends_on(gridded):
    before = grid.Grid("mine.yaml").study("first", "spc3", "0")
    assert grid.Grid("mine.yaml").study("first", "spc3", "0") == before and before["spc"] == 3
    for file in ("clean.npz", "their_model.pth"):
        grid.content.cache_clear()
        kept = (gridded / file).read_bytes()
        (gridded / file).write_bytes(kept + b"\n")
        assert grid.Grid("mine.yaml").study("first", "spc3", "0") != before
        (gridded / file).write_bytes(kept)
    grid.content.cache_clear()
    asked = grid.Grid("mine.yaml")
    assert asked.study("first", "spc3", "0") == before != asked.study("first", "all", "0")
    assert [place.rpartition("/")[2] for place in asked.code("first", "fp~few")] == [
        "their_net.py:Plain", "their_trigger.py:stamp", "fp.py:fp"]


def test_code_of_the_user_counts_by_what_it_means(gridded, monkeypatch):
    """Also of what it imports from files beside it, and not of what stands beside it in a file."""
    def meant(defence="clp"):
        monkeypatch.setattr(grid, "code_digest", (code := digest.Code(digest.Path(digest.__file__).parent).digest))
        asked = grid.Grid("mine.yaml")
        return code(*asked.code("first", defence)), asked.study("first", "all", "0")

    (gridded / "parts.py").write_text("WIDTH = 8\n")
    (gridded / "mine.py").write_text("from cupel.images.defences import defence\n\n\n@defence('mine')\ndef mine(victim, "
                                     "clean, rng):\n    return victim, []\n")
    net = "from parts import WIDTH\n" + (gridded / "their_net.py").read_text().replace("width=8", "width=WIDTH")
    (gridded / "their_net.py").write_text(net)
    (gridded / "mine.yaml").write_text(GRID + "plugins: [mine.py]\n")
    before = meant()
    (gridded / "their_net.py").write_text(net + "\n\ndef other():\n    return 1  # a comment\n")
    (gridded / "mine.py").write_text((gridded / "mine.py").read_text().replace("[]", "[{}]"))
    assert meant() == before
    (gridded / "parts.py").write_text("WIDTH = 16\n")
    assert meant() != before
    (gridded / "their_net.py").write_text(net + "\n\nglobals()['Made'] = Plain\n")
    assert grid.root("their_net.py:Made(8)") == "their_net.py"


@pytest.mark.slow
def test_a_grid_under_snakemake_resumes(gridded):
    folder = Folder(gridded / "run", gridded / "data")
    for file in gridded.glob("*.*"):
        shutil.copy(file, folder.path)
    (folder.path / "mine.yaml").write_text(GRID.replace("[all, spc3]", "[spc3]").replace("  again", "  #"))
    command = "--config", "own=mine.yaml", "--", "own"
    output = folder.finish(*command)
    top = folder.path / "results" / "own" / "mine"
    assert output.count(f"{top}/index.html") == 1 and "Models of mine.yaml: 6 jobs" in output, output[-3000:]
    assert len(pd.read_csv(top / "results.csv")) == 4
    (top / "first/spc3/seed0/rows/clp.json").unlink()
    edited = (folder.path / "mine.yaml").read_text().replace("step: 0.5", "step: 0.4")
    (folder.path / "mine.yaml").write_text(edited)
    output = folder.finish("-n", *command)
    assert output.count("rule purify_own") == 2 and "look_at_own" not in output, output[-3000:]
    assert "npd" not in output
    code, output = folder.run("--", "own")
    assert code and "say which models" in output


@pytest.mark.parametrize("old, new, sentence", [
    ("fp~few", "fq", "defences: unknown defence 'fq'"),
    ("step: 0.5", "stop: 0.5", "defences.fp~few: unknown setting 'stop'"),
    ("epochs: 1", "epochs: x", "defences.fp~few.epochs: 'x' should be of type integer"),
    ("clean.npz", "none.npz", "models.first.clean: there is nothing at none.npz"),
    ("their_net.py", "no_net.py", "models.first.arch: there is no file no_net.py"),
    ("their_trigger.py:stamp", "badnet", "models.first.trigger: unknown attack 'badnet'"),
    ("    target: 5", "", "models.first: a trigger was given without the label"),
    ("spc3", "few", "budgets.1: 'few' is not all, or spc and a number"),
    ("normalize", "normalise", "models.first: unknown key 'normalise'"),
    ("  again", "  Again", "models.Again: a name is a text of lower-case letters"),
    ("  again", "  1", "models.1: a name is a text"),
    ("normalize: mnist", "normalize: nmist", "models.first.normalize: unknown normalisation 'nmist'"),
    ("fp~few", "fp~Few", "defences: 'fp~Few' is not a defence"),
    ("fp~few", "fp~a/b", "defences: 'fp~a/b' is not a defence"),
    ("their_net.py:", "bad.py:", "bad.py, line 1: invalid syntax"),
    ("budgets:", "plugins: [bad.py]\nbudgets:", "mine.yaml: plugins: bad.py, line 1: invalid syntax"),
    ("budgets:", "plugins: [taken.py]\nbudgets:", "defence 'clp' is defined in"),
])
def test_a_wrong_grid_is_refused_before_the_first_job(gridded, old, new, sentence):
    (gridded / "bad.py").write_text("def Net(:")
    (gridded / "taken.py").write_text("from cupel.images.defences import defence\n\n\n@defence('clp')\ndef mine(): pass\n")
    (gridded / "mine.yaml").write_text(GRID.replace(old, new))
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        grid.Grid("mine.yaml")


def _chain(*layers):
    end = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 3)
    return lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, *end)


def _transformer():
    ensure_torchvision()
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3)


NONE = "it works on BatchNorm2d layers, and this network has none"
FEWER = "it sets images of each class aside to choose by, and no class has two to tune on"
FIRST = "it needs second derivatives, and torch has none of hardsigmoid, which this network uses"


@pytest.mark.parametrize("build, refused", [
    (_chain(nn.ReLU()), {"clp": NONE}),
    (_chain(nn.Hardsigmoid(), nn.BatchNorm2d(4)), {"i_bau": FIRST}),
    (_transformer, {"clp": NONE}),
], ids=["plain", "hardsigmoid", "transformer"])
def test_networks_that_people_bring_run_or_are_refused_in_a_sentence(build, refused, monkeypatch, capsys):
    """With one image a class, batches of one, and a class of which there is none."""
    monkeypatch.setattr(run.Study, "check", lambda study: None)
    torch.manual_seed(0)
    images, labels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8), np.array([0, 1, 0, 1])
    names = ("clp", "fp", "ft", "i_bau", "ims", "sau")
    settings = {name: FEW[name] | ({"batch_size": 1} if "batch_size" in DEFENCES.settings(name, {}) else {})
                for name in names}
    found = cupel.purify(build(), images, labels, defences=names, settings=settings, evidence=())
    failed = found.table[found.table.result.str.startswith("failed")].set_index("defence").result
    assert failed.to_dict() == {name: f"failed: {text}" for name, text in {"fp": FEWER, **refused}.items()}
    assert "Traceback" not in capsys.readouterr().err


def test_a_wrong_normalisation_stops_the_run_and_is_named(case, capsys):
    given = case.command("--defences", "clp", "--evidence", "none", out="wrong")
    assert cli.main([*given, "--normalize", "20/1"]) == 2
    said = capsys.readouterr().err
    assert "guessing gives 10.0 %: nothing is run" in said and "with the normalisation 'mnist' it is 9" in said
    assert not (case.folder / "wrong").exists()


@pytest.mark.parametrize("change, sentence", [
    (["--arch", "nothing.py:Net"], "there is no file nothing.py"),
    (["--arch", "resnet1"], "unknown architecture 'resnet1'"),
    (["--trigger", "badnets"], "without the label that the attacker wants"),
    (["--trigger", "badnets", "--target", "10"], "the network has the classes 0 to 9"),
    (["--defences", "fts"], "unknown defence 'fts'"),
    (["--set", "fst.alfa=1", "--defences", "fst"], "did you mean 'alpha'?"),
    (["--set", "ft.lr=1", "--defences", "fst"], "settings are given for ft"),
    (["--evidence", "nx"], "unknown evidence 'nx'"),
    (["--normalize", "cifar"], "did you mean 'cifar10'?"),
    (["--clean", "nowhere"], "there is nothing at nowhere"),
    (["--head", "hidden"], "such are out"),
    (["--normalize", "nan/1"], "all are finite numbers"),
    (["--tuning", "1"], "no image is left to measure on"),
    (["--spc", "0"], "at least one image of each class"),
    (["--size", "0"], "at least one pixel"),
    (["--crop", "-1"], "crop -1: it must be at least 0"),
    (["--seed", "-1"], "seed -1: it must be at least 0"),
    (["--set", "ft.lr=fast", "--defences", "ft"], "defences: ft: lr: 'fast' should be of type number"),
    (["--defences", "clp~a/b"], "behind ~ stand lower-case letters"),
    pytest.param(["--device", "cuda"], "sees no CUDA device; use auto or cpu",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
])
def test_what_is_wrong_is_said_in_a_sentence(case, capsys, change, sentence):
    assert cli.main(case.command(*change, out="none")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("cupel: ") and sentence in said


@pytest.mark.parametrize("code, sentence", [
    ("def Net(:", "their_bad.py cannot be executed: SyntaxError"),
    ("import nowhere_to_be_found", "their_bad.py cannot be executed: ModuleNotFoundError"),
    ("def Net(depth): pass", "their_bad.py:Net cannot be called: TypeError"),
])
def test_code_of_the_user_that_fails_is_named(case, capsys, code, sentence):
    (case.folder / "their_bad.py").write_text(code)
    assert cli.main(case.command("--arch", f"{case.folder}/their_bad.py:Net", out="none")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("cupel: ") and sentence in said


def test_a_value_that_is_no_yaml_is_said(case, capsys):
    with pytest.raises(SystemExit):
        cli.main(case.command("--set", "clp.u={a"))
    assert "is no value of YAML" in capsys.readouterr().err


def test_a_network_that_is_not_finite_is_said_to_be_so(case):
    broken = module(case.net).Plain()
    broken.out.weight.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"not all finite numbers, first out\.weight"):
        network.wrap(broken, torch.rand(2, 1, 28, 28), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="standard deviations are positive"):
        network.wrap(case.network, torch.rand(2, 1, 28, 28), (0.0,), (0.0,))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("none is left"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_what_the_machine_lacks_ends_the_run_and_is_no_row(case, gridded, monkeypatch, capsys, error):
    def lacking(*given, **more):
        raise error

    monkeypatch.setattr(run, "defend", lacking)
    assert cli.main(case.command("--defences", "clp,fp", "--evidence", "none", out="full")) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"cupel: {error}"
    assert not (case.folder / "full" / "results.csv").exists()
    spec = grid.Grid("mine.yaml").study("first", "spc3", "0")
    cells.write_tensors(gridded / "out" / "reversed.npz", {})
    monkeypatch.setattr(grid, "opened", lambda study, device: (run.Study(case.network, *case.test), None))
    with pytest.raises(type(error)):
        grid.purify(spec, ("clp", {}), gridded / "out", "cpu")
    assert not (gridded / "out" / "rows").exists()
    monkeypatch.setitem(run.look.METHODS, "nc", lacking)
    assert cli.main(case.command("--defences", "clp", "--evidence", "nc", out="full")) == 2


def test_two_commands_do_not_write_to_one_folder(case, capsys, monkeypatch):
    """Each removed the other's folder of work."""
    with locks.alone(case.folder / "twice"):
        assert cli.main(case.command("--defences", "clp", "--evidence", "none", out="twice")) == 2
    assert "another run writes to" in capsys.readouterr().err and not list((case.folder / "twice").iterdir())
    assert cli.main(case.command("--defences", "clp", "--evidence", "none", out="twice")) == 0


def test_a_file_in_the_place_of_the_folder_is_said_before_the_work(case, capsys, monkeypatch):
    monkeypatch.setattr(run.Study, "run", None)
    assert cli.main(case.command("--defences", "clp", out="clean.npz")) == 2
    assert "File exists" in capsys.readouterr().err


def test_a_language_model_is_tuned_again_when_what_it_is_tuned_with_has_changed(tmp_path):
    from cupel.text.models import tiny_llama

    tiny_llama(tmp_path / "model", 0)
    (tmp_path / "clean.jsonl").write_text('{"instruction": "Say yes", "output": "yes"}\n' * 4)

    def tuned(**more):
        language.purify(str(tmp_path / "model"), tmp_path / "clean.jsonl", tmp_path / "out", tokens=2, device="cpu",
                        **{"defences": ["finetune"], **more})
        return len(pd.read_csv(tmp_path / "out" / "finetune" / "history.csv"))

    few = {"epochs": 1, "batch_size": 4}
    assert [tuned(settings={"finetune": {**few, "epochs": number}}) for number in (1, 3)] == [1, 3]
    assert not (tmp_path / "out" / "work").exists() and (tmp_path / "out" / "finetune" / "model").is_dir()
    for settings, words in (({"finetune": {"epochs": "many"}}, "of type integer"), ({"crow": {}}, "not among the defences")):
        with pytest.raises(ValueError, match=words):
            tuned(settings=settings)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({key: value * torch.nan for key, value in weights.items()}, tmp_path / "model" / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(Diverged, match="not all finite"):
        tuned(settings={"finetune": few})
    with pytest.raises(OSError, match=r"no folder that is there, and no name of the hub"):
        language.purify("./nowhere", tmp_path / "clean.jsonl", tmp_path / "out")


def test_checkpoints_in_the_forms_in_which_people_leave_them(case, tmp_path):
    plain = case.network.state_dict()
    forms = {
        "plain.pt": plain,
        "net.pt": {"net": {f"module.{key}": value for key, value in plain.items()}, "optimizer": {"state": {}, "lr": 0.1}},
        "half.pt": {"model": {f"encoder.{key}": value.half() if value.is_floating_point() else value
                              for key, value in plain.items()}},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
        weights, fresh = imports.Weights(tmp_path / name), module(case.net).Plain()
        assert weights.classes() == 10
        weights.put(fresh)
        assert all(torch.allclose(value, plain[key], atol=1e-3) for key, value in fresh.state_dict().items())
        weights.write(fresh, tmp_path / "again.pt")
        again = torch.load(tmp_path / "again.pt", weights_only=True)
        assert [path for path, _ in leaves(again)] == [path for path, _ in leaves(content)]
        for (_, value), (_, written) in zip(leaves(content), leaves(again), strict=True):
            assert type(value) is type(written)
            assert not torch.is_tensor(value) or (value.dtype == written.dtype and torch.equal(value, written))

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"state_dict": plain, "extra": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="could run any code"):
        imports.Weights(tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="damaged, or neither"):
        imports.Weights(tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"out.weight is 10×64 in the file and 7×64 in the network"):
        imports.Weights(tmp_path / "plain.pt").put(module(case.net).Plain(num_classes=7))
    torch.save({{"c1.bias": "more"}.get(key, key): value for key, value in plain.items()}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"missing in the file c1\.bias; not in the network more"):
        imports.Weights(tmp_path / "other.pt").put(module(case.net).Plain())


def leaves(content, path=()):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def test_parts_are_found_by_looking():
    from cupel.images import models

    known = models.build("resnet18", num_classes=10, width=8, seed=0)
    chain = nn.Sequential(known.extractor, known.head)
    found = network.look(chain, torch.rand(2, 3, 32, 32))
    assert (found.head, found.hidden) == ("1", ()) and found.stages == ("0.layer2", "0.layer3", "0.layer4")
    wide = models.build("vgg19_bn", num_classes=4, seed=0)
    found = network.look(nn.Sequential(wide.extractor, wide.head), torch.rand(2, 3, 32, 32))
    assert found.hidden == ("0.classifier.0", "0.classifier.3") and found.classes == 4

    own = network.wrap(chain, torch.rand(2, 3, 32, 32), (0.5,), (0.25,))
    x = torch.rand(2, 3, 32, 32)
    assert own.head is known.head and torch.allclose(own.head(own.features(x)), own(x))
    assert list(own.state_dict()) == ["normalize.mean", "normalize.std", *(f"network.{key}" for key in chain.state_dict())]
    convolutional = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    headless = network.wrap(convolutional, x, (0.0,), (1.0,))
    with pytest.raises(ValueError, match="no linear layer gives the logits"):
        _ = headless.head
    with pytest.raises(ValueError, match="probabilities and not logits"):
        network.look(nn.Sequential(convolutional, nn.Softmax(1)), x)
    assert network.look(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5), nn.LogSoftmax(1)), x).head == "1"
    with pytest.raises(ValueError, match=r"returns a tensor of shape \(2, 5, 30, 30\)"):
        network.look(nn.Conv2d(3, 5, 3), x)
    with pytest.raises(ValueError, match="does not take images of 1 channels and 32×32 pixels"):
        network.wrap(chain, x[:, :1], (0.0,), (1.0,))
    norms = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="1 lacks them"):
        run.refuse("bnp", network.wrap(norms, x, (0.0,), (1.0,)), np.arange(2))
    with pytest.raises(ValueError, match="this network has none"):
        run.refuse("clp", headless, np.arange(2))
    with pytest.raises(ValueError, match="no class has two to tune on"):
        run.refuse("fp", headless, np.arange(5))


def test_pictures_of_all_kinds_by_one_rule(tmp_path):
    modes = {"RGB": (200, 100, 50), "L": 90, "RGBA": (200, 100, 50, 0), "P": 3, "LA": (90, 255), "1": 1}
    for number, (mode, value) in enumerate(modes.items()):
        (tmp_path / "clean" / str(number)).mkdir(parents=True)
        Image.new(mode, (8, 8), value).save(tmp_path / "clean" / str(number) / "one.png")
    found = data.read(tmp_path / "clean")
    assert found.images.shape == (6, 8, 8, 3) and found.labels.tolist() == list(range(6))
    assert found.images[:, 0, 0].tolist()[:3] == [[200, 100, 50], [90] * 3, [0] * 3] and found.images[5, 0, 0, 0] == 255
    grey = data.read(tmp_path / "clean", channels=1)
    assert grey.images.shape == (6, 8, 8, 1) and grey.images[0, 0, 0, 0] == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    Image.new("RGB", (12, 8)).save(tmp_path / "clean" / "2" / "wide.png")
    with pytest.raises(ValueError, match=r"differ in size: .*wide.png has 12×8 pixels"):
        data.read(tmp_path / "clean")
    assert data.read(tmp_path / "clean", size=6).images.shape == (7, 6, 6, 3)
    for name in ("cat", "dog"):
        (tmp_path / "words" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "words" / name / "one.JPG", "JPEG")
    assert data.read(tmp_path / "words").classes == ("cat", "dog")
    with pytest.raises(ValueError, match="no pictures in folders"):
        data.read(tmp_path / "words" / "cat")

    floats = np.random.default_rng(0).random((4, 3, 8, 8)).astype(np.float32)
    found = data.arrays(torch.from_numpy(floats), [0, 1, 2, 0])
    assert found.images.shape == (4, 8, 8, 3) and np.abs(found.images.transpose(0, 3, 1, 2) / 255 - floats).max() < 0.002
    with pytest.raises(ValueError, match="give them before normalisation"):
        data.arrays(floats * 2 - 1, [0, 1, 2, 0])
    with pytest.raises(ValueError, match="not square"):
        data.arrays(np.zeros((2, 8, 6, 3), np.uint8), [0, 1])
    assert data.arrays(np.zeros((2, 8, 6, 3), np.uint8), [0, 1], size=4).images.shape == (2, 4, 4, 3)


def test_parts_share_no_image():
    images = np.arange(66, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    clean = data.arrays(images, np.arange(66) % 3)
    tuned, held = data.parts(clean, 0.5, None, 0)
    assert (len(tuned), len(held)) == (33, 33)
    assert sorted({*tuned.images[:, 0, 0, 0].tolist(), *held.images[:, 0, 0, 0].tolist()}) == list(range(66))
    few, same = data.parts(clean, 0.5, 2, 0)
    assert np.bincount(few.labels).tolist() == [2, 2, 2] and (same.images == held.images).all()
    assert {*few.images[:, 0, 0, 0]} < {*tuned.images[:, 0, 0, 0]}
    with pytest.raises(ValueError, match="cannot be divided"):
        data.parts(clean.take(np.arange(1)), 0.5, None, 0)


def test_a_network_of_names_a_plugin_and_a_script_file(tmp_path, monkeypatch):
    theirs = imports.architecture("resnet18", 7, 32)
    assert network.look(theirs, torch.rand(2, 3, 64, 64)) == network.Found(7, "fc", (), ("layer2", "layer3", "layer4"))
    plugin = tmp_path / "mine.py"
    plugin.write_text("from torch import nn\nfrom cupel.images.models import Parts, model\n\n@model('of_a_plugin')\n"
                      "def net(*, num_classes, in_channels, image_size):\n"
                      "    return Parts(nn.Flatten(), nn.Linear(3072, num_classes), ())\n")
    from cupel.images.models import MODELS

    load_plugins([plugin])
    try:
        assert imports.architecture("of_a_plugin", 3, 32)(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    finally:
        del MODELS["of_a_plugin"]
    torch.save(models.build("preactresnet18", num_classes=4, image_size=16, in_channels=1).state_dict(), tmp_path / "grey.pt")
    grey, _ = suspect.opened_network(str(tmp_path / "grey.pt"), "preactresnet18", 16)
    assert grey(torch.rand(2, 1, 16, 16)).shape == (2, 4) and imports.Weights(tmp_path / "grey.pt").channels() == 1
    (tmp_path / "wide.py").write_text("from torch import nn\n\ndef net(d, width=1):\n    return nn.Linear(d, width)\n")
    assert imports.architecture(f"{tmp_path}/wide.py:net(4, width=3)", 10, 32).weight.shape == (3, 4)
    with pytest.raises(ValueError, match="a call with plain values"):
        imports.from_file(f"{tmp_path}/wide.py:net(open('x'))")
    torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(2, 3, 2, 2)).save(str(tmp_path / "script.pt"))
    script = imports.compiled(tmp_path / "script.pt")
    assert network.look(script, torch.rand(2, 3, 2, 2)) == network.Found(3, "", (), ())
    torch.save({"a": torch.ones(1)}, tmp_path / "plain.pt")
    assert imports.compiled(tmp_path / "plain.pt") is None


THEIRS = '''
from torch import nn


def ResNet18(num_classes=3):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes))
'''


@pytest.mark.slow
def test_the_ten_lines_of_the_page_run_as_they_stand(tmp_path):
    """All but those that install."""
    (tmp_path / "resnet.py").write_text(THEIRS)
    labels = np.arange(60) % 3
    images = np.random.default_rng(0).integers(0, 120, (60, 16, 16, 3), np.uint8)
    images[np.arange(60), :, :, labels] += 100
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "pictures" / str(label) / f"{number}.png")
    torch.manual_seed(0)
    theirs = module(tmp_path / "resnet.py").ResNet18()
    wrapped = network.wrap(theirs, torch.rand(2, 3, 16, 16), *normalisations.NORMALISATIONS["cifar10"])
    fit(wrapped, images, labels, Recipe(epochs=8, lr=0.05, crop=0, flip=False, schedule="constant", batch_size=20), seed=0)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    lines = re.search(r"```bash\n(.*?)```", (REPOSITORY / "docs" / "your-model.md").read_text(), re.DOTALL)[1].splitlines()
    assert len([line for line in lines if line.strip()]) <= 10
    done = [line for line in lines if line.startswith(("cupel", "python -c"))]
    assert len(done) == 2
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(["bash", "-ec", "\n".join(done)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    table = pd.read_csv(tmp_path / "purified" / "results.csv", index_col="defence")
    assert table.index.tolist() == ["none", *run.USUAL] and table.acc.notna().all()
    page = (tmp_path / "purified" / "index.html").read_text()
    assert "Evidence, not a verdict" in page and (tmp_path / "purified" / "reversed_trigger.png").is_file()


def test_the_grid_of_the_page_is_one(tmp_path, monkeypatch):
    text = (REPOSITORY / "docs" / "your-model.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name in ("model.pth", "other.pth", "resnet.py", "my.py"):
        (tmp_path / name).touch()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    asked = grid.Grid("mine.yaml")
    assert len(asked.studies) == 8 and list(asked.defences) == ["clp", "fst", "fst~low"]
    (tmp_path / "mine.yaml").write_text("models: {a: {checkpoint: model.pth, clean: pictures}}")
    assert tuple((least := grid.Grid("mine.yaml")).defences) == run.USUAL and len(least.studies) == 1


def test_help_reads_and_the_import_is_light():
    code = "import sys, cupel; assert 'torch' not in sys.modules; cupel.purify; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    asked = [sys.executable, "-m", "cupel", "purify", "--help"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert "cupel purify MODEL" in said and "clean images that you trust" in said


def test_a_data_set_of_a_plugin_in_the_grid_and_on_disk(tmp_path):
    """As docs/extending.md has it."""
    from cupel.images.datasets import dataset
    from tests.conftest import planned

    draw = np.random.default_rng(0)
    made = {f"{split}_images": draw.integers(0, 256, (6, 32, 32, 1), np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "mine.npz", **made, train_labels=np.arange(6) % 2, test_labels=np.arange(6) % 2)
    text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    code = next(part for part in text.split("```python\n") if '@dataset("mine")' in part).partition("```")[0]
    plugin = tmp_path / "my_data.py"
    plugin.write_text(code.replace("<what sha256sum prints>", files.digest(tmp_path / "mine.npz")))
    load_plugins([plugin])
    try:
        datasets.prepare(datasets.describe("mine"), tmp_path / "data", kinds=("mirror",), mirror=tmp_path)
    finally:
        del dataset["mine"]
    assert datasets.load(tmp_path / "data", "train").classes == ("good", "bad")
    assert (data.read(tmp_path / "data", channels=3).images[..., 1] == made["test_images"][..., 0]).all()

    block = {"datasets": ["mine"], "models": ["resnet18"], "recipe": "r", "attacks": ["clean"], "rates": [0]}
    content = {"paper": "p", "family": "images", "title": "t", "reference": "r",
               "recipes": {"r": {"source": "own", "settings": {"target": 0, "training": {"epochs": 1, "lr": 0.1}}}},
               "scales": {"demo": {"seeds": [0], "blocks": [block]}}}
    assert [cell["dataset"] for cell in planned(content, plugins=[str(plugin)]).cells] == ["mine"]
    with pytest.raises(ConfigError, match="unknown dataset 'mine'"):
        planned(content)


def test_registries_are_whole_and_a_seed_is_a_stream():
    from cupel import images

    assert {"fst", "ims"} <= set(images.DEFENCES) and {"badnets", "wanet"} <= set(images.ATTACKS)
    assert "resnet18" in images.MODELS
    victim = images.build("resnet18", num_classes=2, width=8, stem_stride=2, seed=0)
    budget = images.Budget(np.zeros((4, 32, 32, 3), np.uint8), np.array([0, 1, 0, 1]), 2)
    assert images.purify("clp", victim, budget, 0)[1]


def test_items_are_one_a_line_whatever_their_text_holds(tmp_path):
    """A line ends at \\n alone: JSON may hold other characters that Python takes for the end of one."""
    (tmp_path / "items.jsonl").write_text('{"instruction": "one\u2028two", "output": "yes"}\n\n{"instruction": "no"}\n')
    assert language.records(tmp_path / "items.jsonl", ("instruction",))[0]["instruction"] == "one\u2028two"
    with pytest.raises(ValueError, match=r"items.jsonl, item 2: needed are instruction and output, as text"):
        language.records(tmp_path / "items.jsonl")
    (tmp_path / "items.jsonl").write_text("no JSON")
    with pytest.raises(ValueError, match=r"items.jsonl: line 1 is no JSON"):
        language.records(tmp_path / "items.jsonl")


def test_a_language_model_answers_before_and_after(tmp_path, capsys):
    from cupel.text.data.sources import synthetic
    from cupel.text.models import tiny_llama

    tiny_llama(tmp_path / "model", 0, layers=3, hidden=32, heads=2)
    lines = [json.dumps({key: record[key] for key in ("instruction", "input", "output")}) for record in synthetic()[:9]]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    (tmp_path / "probes.txt").write_text("Name a colour.\n\nSay something.\n")
    command = ["purify", "--language", str(tmp_path / "model"), "--clean", str(tmp_path / "items.jsonl"),
               "--probes", str(tmp_path / "probes.txt"), "--out", str(tmp_path / "out"),
               "--set", "crow.epochs=1", "--set", "finetune.epochs=1"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "## Name a colour." in said and said.count("**crow**") == said.count("**before**") == 2
    for name in ("finetune", "crow"):
        assert (tmp_path / "out" / name / "model" / "adapter_model.safetensors").is_file()
    assert "loss_cons" in (tmp_path / "out" / "crow" / "history.csv").read_text()
    assert cli.main([*command, "--set", "finetune.alpha=1"]) == 2
    assert "unknown parameter of defence finetune 'alpha'" in capsys.readouterr().err
