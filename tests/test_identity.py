"""What makes a job run again, and what does not: plugins, prepared data, wishes for a machine. Nothing is trained here."""

import json
import os
import shutil

import pytest

from tests.test_workflow import Folder, jobs

PLUGIN = """
from dataclasses import dataclass
import torch
from cupel.images.attacks import Attack, attack
from cupel.images.defences import defence
from cupel.images.models import Parts, model

@attack("dark")
@dataclass(frozen=True)
class Dark(Attack):
    def stamp(self, images):
        return images // 2

@defence("same")
def same(victim, budget, rng):
    return victim, []

@model("flat")
def flat(*, num_classes, in_channels, image_size):
    return Parts(torch.nn.Flatten(), torch.nn.Linear(in_channels * image_size**2, num_classes), stages=("0",))
"""
VICTIM = "results/smoke/images/victims/cifar10/{}/fst/{}@0.05/seed0"
PURIFIED = "results/smoke/images/purified/cifar10/{}/fst/{}@0.05/seed0/{}@heldout"
PLAIN, OWN = ("preactresnet18", "badnets", "ft"), ("flat", "dark", "same")


class Done(Folder):
    """A folder in which Snakemake takes cells for done, although their files are empty."""

    def __init__(self, path, data, *cells):
        super().__init__(path, data)
        (path / "mine.py").write_text(PLUGIN)
        self.set(plugins=["mine.py"])
        self.asked = [f"{PURIFIED.format(*cell)}/metrics.json" for cell in cells]
        for model, attack, defence in cells:
            for folder, names in ((VICTIM.format(model, attack), ("poison.npz", "trigger.npz")),
                                  (PURIFIED.format(model, attack, defence), ())):
                (path / folder).mkdir(parents=True)
                for name in (*names, "model.safetensors", "history.csv", "metrics.json"):
                    (path / folder / name).touch()
        code, output = self.run("--touch", "-R", "poison", "train_victim", "purify", "--", *self.asked)
        assert code == 0, output[-3000:]

    def again(self, *options):
        """Rules that would run."""
        code, output = self.run("-n", *options, "--", *self.asked)
        assert code == 0, output[-3000:]
        return set() if "Nothing to be done" in output else set(jobs(output)) - {"total"}


@pytest.fixture
def data(tmp_path, cifar10):
    """Prepared data of its own, with another manifest than the shared one."""
    folder = tmp_path / "data" / "images" / "cifar10"
    folder.mkdir(parents=True)
    for path in cifar10.glob("*.npy"):
        (folder / path.name).symlink_to(path.resolve())
    shutil.copy(cifar10 / "manifest.json", folder)
    return tmp_path / "data"


def test_a_plugin_counts_where_it_is_used(tmp_path, data):
    folder = Done(tmp_path / "run", data, PLAIN, OWN)
    assert folder.again() == set()
    for old, new, expected in (("return images // 2", "return images // 3", {"poison", "train_victim", "purify"}),
                               ("return victim, []", "return victim, [{}]", {"purify"}),
                               ("nn.Flatten()", "nn.Flatten(1)", {"train_victim", "purify"})):
        folder.edit("mine.py", old, new)
        assert folder.again() == expected, new
        folder.edit("mine.py", new, old)
    (folder.path / "own").mkdir()
    (folder.path / "mine.py").rename(folder.path / "own" / "mine.py")
    folder.set(plugins=["own/mine.py"])
    assert folder.again() == set(), "a plugin elsewhere"
    folder.asked = folder.asked[:1]
    folder.set(plugins=[])
    assert folder.again() == set(), "without a plugin that is not used"


def test_data_count_by_what_they_hold(tmp_path, data):
    folder, shared = Done(tmp_path / "run", data, PLAIN), data / "images" / "cifar10"
    for path in shared.glob("*.npy"):
        os.utime(path, follow_symlinks=False)  # Snakemake looks at the link as well
    manifest = json.loads((shared / "manifest.json").read_text())
    (shared / "manifest.json").write_text(json.dumps({**manifest, "source": {"kind": "mirror"}}))
    assert folder.again() == set()
    (shared / "manifest.json").write_text(json.dumps({**manifest, "content_sha256": "0" * 64}))
    assert folder.again() == {"poison", "train_victim", "purify"}


def test_a_second_clone_takes_shared_data_as_they_are(tmp_path, data):
    (data / "images" / "cifar10").chmod(0o555)
    fresh = Folder(tmp_path / "fresh", data)
    fresh.set(papers=["fst"])
    for path in (fresh.path / "workflow").rglob("*.py"):
        path.touch()  # a clone is younger than the data
    code, output = fresh.run("-n", "data", "--", f"{VICTIM.format(*PLAIN)}/metrics.json")
    assert code == 0 and "prepare_images" not in jobs(output)


def test_where_it_is_computed_is_no_part_of_a_cell(tmp_path, data):
    folder = Done(tmp_path / "run", data, PLAIN)
    assert folder.again("--config", "device=cpu") == set()
    folder.set(data={"folder": str(data), "mirror": "/elsewhere", "sources": ["mirror"]})
    (folder.path / "workflow" / "scripts" / "purify.py").touch()
    assert folder.again() == set()
