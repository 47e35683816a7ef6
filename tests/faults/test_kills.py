"""kill -9 of the whole process group at random moments of every stage, and the run after it.

Each stage runs alone, in copies of a finished run from which its outputs are removed. Moments are drawn uniformly between the
start of the job and its end, as measured without a kill. After each kill: what stands under its final name is complete, what
other stages made is untouched, no process is left. The killed run is started again, as a user would, with the same command;
it is killed again, and every fifth start is let finish: its results and list of files are then those of the undisturbed run.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cupel.files import digest
from tests.faults.record import shorten, trial
from tests.faults.runs import PAPER, PURIFIED, VICTIM, content, contents, copy, error_lines, listing, processes_in, remove
from tests.faults.trainings import TRAININGS, saved
from tests.test_workflow import jobs

KILLS = int(os.environ.get("CUPEL_KILLS", 20))
CHAIN = 5   # kills before a run is let finish
LANES = min(2, os.cpu_count() or 1)

CELL = ("model.safetensors", "history.csv", "metrics.json")
DATA = tuple(f"data/images/cifar10/{name}" for name in (
    "train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy", "manifest.json"))
# outputs of each stage; the last one is asked for
STAGES = {
    "prepare data": DATA,
    "poison": (f"{VICTIM}/poison.npz",),
    "train victim": (f"{VICTIM}/trigger.npz", *(f"{VICTIM}/{name}" for name in CELL)),
    "purify (a job per cell)": tuple(f"{PURIFIED}/fst@heldout/{name}" for name in CELL),
    "purify (a job per victim)": tuple(f"{PURIFIED}/{defence}@heldout/{name}" for defence in ("ft", "fst") for name in CELL),
    "gather": ("results/smoke/cells.parquet",),
    "report": (f"{PAPER}/tables", f"{PAPER}/figures", f"{PAPER}/claims.csv"),
    "notebook": (f"{PAPER}/report.ipynb", f"{PAPER}/card.md", f"{PAPER}/report.html"),
    "index": ("results/smoke/claims.csv", "results/smoke/provenance.json", "results/smoke/index.html"),
}

LANGUAGE = "results/smoke/text/{}/negsentiment/tiny/crow/badnets@0.5/seed0"
PICTURES = "results/smoke/vision_language/{}/shapes_tiny/micro_llava/micro_lora/square~quarter@0.2/seed0"
POISONED = "results/smoke/vision_language/poisoned/shapes_tiny/square~quarter@0.2/seed0"
BASE = "results/smoke/vision_language/bases/shapes_tiny/micro_llava/seed0"
ROBUST = "results/smoke/robust/{}/mnist/small/main/int/seed0"
TUNED = ("model", "answers", "history.csv", "layers.csv", "metrics.json")
ASKED = ("history.csv", "answers_clean.parquet", "answers_triggered.parquet", "metrics.json")


def below(folder, names):
    return tuple(f"{folder}/{name}" for name in names)


# as STAGES, of the papers on other than image classifiers
FAMILIES = {
    "compose texts": below(LANGUAGE.format("victims") + "/texts", (
        *(f"{part}.jsonl" for part in ("train", "defence", "triggered", "clean", "heldout")), "summary.json")),
    "train language victim": below(LANGUAGE.format("victims"), TUNED),
    "purify language (CROW)": below(LANGUAGE.format("purified") + "/crow@few", TUNED),
    "build multimodal model": below(BASE, ("model", "history.csv", "base.json")),
    "poison samples": below(POISONED, ("train.jsonl", "images.npy", "manifest.json", "poison.json")),
    "train multimodal victim": below(PICTURES.format("victims"), ("model", *ASKED)),
    "read attention": below(PICTURES.format("filtered"), ("entropies.parquet", "maps.npz", "attention.json")),
    "filters": below(PICTURES.format("filtered"), ("flags", "filters.json", "metrics.json")),
    "refit (BYE)": below(PICTURES.format("purified") + "/bye", ASKED),
    "train robust network": below(ROBUST.format("trained"), ("model.safetensors", "history.csv", "metrics.json")),
    "attack network": below(ROBUST.format("attacked") + "/sweep", ("evaluation.npz", "metrics.json")),
}
STAGES |= FAMILIES


class Lane:
    """One copy in which a stage is killed and run again.

    Args:
        folder: the copy, finished.
        stage: of `STAGES`.
        seed: of the moments.
    """

    def __init__(self, folder, stage, seed):
        self.folder, self.stage, self.outputs, self.draw = folder, stage, STAGES[stage], random.Random(seed)
        self.tops = ("results", "data") if "data" in self.outputs[0] else ("results",)
        self.begin()
        planned = jobs(folder.run("-n", "--", self.outputs[-1])[1])
        assert len(planned) == 1 and set(planned.values()) == {1}, f"not this stage alone: {planned}"
        process, began = self.start()
        output, _ = process.communicate(timeout=900)
        self.seconds = time.monotonic() - began
        assert process.returncode == 0, output[-3000:]
        self.before = {name: content(folder.path / name) for name in self.outputs}
        self.files = listing(folder, *self.tops)
        # a cell's folder `work` is what its job keeps
        mine = tuple(f"{place}/" for output in self.outputs for place in (output, f"{output.rpartition('/')[0]}/work"))
        own = {name for name in self.files if name in self.outputs or name.startswith(mine)}
        self.others = contents(folder, sorted(self.files - own))
        self.begin()

    def begin(self):
        """As if the stage had never run."""
        remove(self.folder, *self.outputs)

    def start(self):
        """Start a run; the process, and when its job began (when it ended, if there was none)."""
        begun = time.time()
        process = self.folder.start("--", self.outputs[-1])
        marks = self.folder.path / ".snakemake" / "incomplete"
        while process.poll() is None:
            if any(mark.stat().st_mtime >= begun for mark in marks.glob("**/*") if mark.is_file()):
                break
            time.sleep(0.01)
        return process, time.monotonic()

    def kill(self):
        """One kill in the middle of the job, and a look at what it left."""
        while True:
            process, began = self.start()
            share = self.draw.random()
            time.sleep(max(0.0, began + share * self.seconds - time.monotonic()))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                break
            # it was faster than the run that was measured: the end came first, and this was no kill
            output, _ = process.communicate()
            assert process.returncode == 0, output[-3000:]
            self.begin()
        variant = f"{100 * share:.0f} % of {self.seconds:.1f} s"
        with trial("kill", self.stage, variant) as row:
            left = processes_in(self.folder.path)
            assert not left, f"processes are left: {left}"
            complete = [name for name in self.outputs if (self.folder.path / name).exists()]
            whole = [name for name in complete if content(self.folder.path / name) == self.before[name]]
            folders = [name for name in complete if (self.folder.path / name).is_dir()]  # begun anew by Snakemake
            assert set(complete) == set(whole) | set(folders), f"cut off: {sorted(set(complete) - set(whole))}"
            there = contents(self.folder, self.others)
            assert there == self.others, "results of other stages changed"
            row.happened = "killed" if len(whole) < len(self.outputs) else "killed after all was written"
        return row

    def finish(self, rows):
        """Let the run come to its end; what it gives decides about the kills before it."""
        try:
            code, output = self.folder.run("--", self.outputs[-1])
            assert code == 0, error_lines(output, "Error", "error") or output[-500:]
            found = {name: content(self.folder.path / name) for name in self.outputs}
            differing = [name for name in self.outputs if found[name] != self.before[name]]
            assert not differing, f"differ from the undisturbed run: {differing}"
            assert contents(self.folder, self.others) == self.others, "results of other stages changed"
            files = listing(self.folder, *self.tops)
            assert files == self.files, f"left behind: {sorted(files - self.files)}; missing: {sorted(self.files - files)}"
            if self.stage in ("train victim", "train language victim", "train multimodal victim", "train robust network"):
                nothing = self.folder.run("-n", "--", self.outputs[-1])[1]
                assert "Nothing to be done" in nothing, "the finished run would be made again"
        except AssertionError as error:
            for row in rows:
                row.ok, row.happened, row.lost = False, "the next run is not as it must be", "yes"
                row.message = shorten(str(error), 300)
            raise
        for row in rows:
            row.happened += ", the same command ends with identical results"
        self.begin()

    def work(self, kills):
        while kills:
            now = min(kills, CHAIN)
            self.finish([self.kill() for _ in range(now)])
            kills -= now


def settings_of_data(cifar10):
    """Settings with which the data set is made without network, from what the prepared one was made of."""
    import json

    kind = json.loads((cifar10 / "manifest.json").read_text())["source"]["kind"]
    return {"folder": "data", "sources": [kind], "mirror": os.environ.get("CUPEL_MIRROR") if kind == "mirror" else None}


@pytest.mark.parametrize("stage", STAGES)
def test_kill(request, cifar10, tmp_path, monkeypatch, stage):
    whole = request.getfixturevalue("undisturbed_families" if stage in FAMILIES else "undisturbed")
    # what a killed process leaves in the system's folder for temporary files is the system's to clear away
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    lanes = min(LANES, KILLS)

    def lane(number):
        folder = copy(whole, tmp_path / f"lane{number}")
        if stage == "prepare data":
            folder.set(data=settings_of_data(cifar10))
        if stage == "purify (a job per victim)":
            folder.set(jobs="victim")
        Lane(folder, stage, 1000 * list(STAGES).index(stage) + number).work((KILLS + number) // lanes)

    with ThreadPoolExecutor(lanes) as pool:
        for done in [pool.submit(lane, number) for number in range(lanes)]:
            done.result()
    for number in range(lanes):
        shutil.rmtree(tmp_path / f"lane{number}")  # pytest would keep some gigabytes


def start_training(kind, folder):
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "tests.faults.trainings", kind, str(folder)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    assert process.stdout.readline() == "begin\n"
    return process


@pytest.mark.parametrize("kind", TRAININGS)
def test_kill_of_a_long_training(tmp_path, kind):
    """With a checkpoint whenever there can be one, a kill costs at most the epoch or update under way."""
    unit = "epoch" if kind == "image" else "update"
    process = start_training(kind, tmp_path / "whole")
    began = time.monotonic()
    assert process.communicate()[0].endswith("end\n")
    seconds = time.monotonic() - began
    draw, folder, rows, there = random.Random(7), tmp_path / "killed", [], 0
    for _ in range(KILLS):
        process, lines = start_training(kind, folder), []
        reader = threading.Thread(target=lambda process=process, lines=lines: lines.extend(process.stdout))
        reader.start()
        moment = draw.random() * 1.6 * seconds / KILLS  # together most of the training
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join()
        what = f"{TRAININGS[kind].what.removeprefix('a ')} with a checkpoint after every {unit}"
        with trial("kill", what, f"{moment:.2f} s after its start") as row:
            if "end\n" in lines:  # done before the kill
                row.happened = "killed after all was written"
            else:
                before, there = there, saved(kind, folder)
                done = lines.count("done\n")
                assert there >= before + done - 1, f"{before + done - there} {unit}s are lost"
                row.happened = "killed, continued from the last checkpoint, same bits at the end"
                row.lost = "none" if there == before + done else f"the {unit} whose checkpoint was not yet written"
        rows.append(row)
        if row.happened.startswith("killed after"):
            break
    process = start_training(kind, folder)
    try:
        assert process.communicate()[0].endswith("end\n")
        assert digest(folder / "model.safetensors") == digest(tmp_path / "whole" / "model.safetensors")
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    except AssertionError:
        for row in rows:
            row.ok = False
        raise
