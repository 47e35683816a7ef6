"""Files offered as models, tensors and checkpoints that are pickles, lie about their size, or are bombs."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from cupel.images import models
from cupel.images.models import NotACheckpoint
from cupel.training.resume import DamagedCheckpoint
from tests.faults.record import shorten, trial
from tests.faults.runs import PURIFIED, VICTIM, copy, remove
from tests.faults.trainings import TRAININGS, saved, train

MARK = "CUPEL_FAULT_MARK"


class Evil:
    """Leaves a file where the environment says, when it is unpickled."""

    def __reduce__(self):
        return exec, (f"import os; open(os.environ[{MARK!r}], 'w').close()",)


@pytest.fixture
def mark(tmp_path, monkeypatch):
    path = tmp_path / "executed"
    monkeypatch.setenv(MARK, str(path))
    pickle.loads(pickle.dumps(Evil()))  # it does what it says
    assert path.exists()
    path.unlink()
    return path


def network():
    return models.build("preactresnet18", num_classes=10, image_size=32, seed=0, width=8)


def header(content, data=b"", length=None):
    """A safetensors file with a header of one's own."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def torch_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def claimed(tensors=None, **changes):
    """A file that says it is a network of the library."""
    spec = {**network().spec, **changes}
    return save(tensors if tensors is not None else {k: v.contiguous() for k, v in network().state_dict().items()},
                {"cupel": json.dumps({"format": "cupel.classifier/1", "spec": spec})})


def whole():
    return claimed()


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MODELS = {
    "pickle by torch.save": lambda: torch_file({"a": Evil()}),
    "pickle": lambda: pickle.dumps(Evil()),
    "pickle, protocol 0": lambda: pickle.dumps(Evil(), 0),
    "pickle after a safetensors header": lambda: whole() + pickle.dumps(Evil()),
    "safetensors: header of 4 EB": lambda: header(b"{}", length=1 << 62),
    "safetensors: header longer than the file": lambda: header(b"{}", length=100_000),
    "safetensors: header of 100 MB": lambda: header(b"{" + b" " * 100_000_000 + b"}"),
    "safetensors: tensor of a petabyte": lambda: header({"a": tensor([1 << 48], 0, 1 << 50)}, b"1234"),
    "safetensors: size that overflows": lambda: header({"a": tensor([1 << 62, 16], 0, 4)}, b"1234"),
    "safetensors: tensors that overlap": lambda: header({"a": tensor([1], 0, 4), "b": tensor([1], 2, 6)}, b"123456"),
    "safetensors: offsets before the file": lambda: header({"a": tensor([1], -8, -4)}, b"1234"),
    "safetensors: unknown type": lambda: header({"a": tensor([1], 0, 4, "PICKLE")}, b"1234"),
    "safetensors: nested a hundred thousand deep": lambda: header(b"[" * 100_000),
    "safetensors: no text": lambda: header(b"\xff\xfe\x00{"),
    "safetensors: a tensor twice": lambda: header(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                                                  b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "safetensors: cut off": lambda: whole()[:-1000],
    "safetensors: a recipe with a path": lambda: claimed(name="../../evil"),
    "safetensors: a recipe with unknown arguments": lambda: claimed(evil="import os"),
    "safetensors: a recipe of a billion classes": lambda: claimed(num_classes=10**9),
    "safetensors: a recipe of enormous width": lambda: claimed(width=10**7),
    "safetensors: tensors of another network": lambda: claimed({"evil": torch.zeros(3)}),
    "safetensors: a bomb of nested JSON in the recipe": lambda: save(
        {"a": torch.zeros(1)}, {"cupel": "[" * 100_000 + "]" * 100_000}),
    "zip bomb": lambda: bomb(),
    "empty": lambda: b"",
}


def bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("archive/data.pkl", bytes(1 << 26))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", MODELS)
def test_a_model(tmp_path, mark, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MODELS[kind]())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with trial("checkpoint", f"as a model, {kind}") as row:
        start = time.monotonic()
        with pytest.raises(NotACheckpoint) as caught:
            models.load(path)
        assert not mark.exists(), "code of the file was run"
        assert str(path) in str(caught.value) and time.monotonic() - start < 30
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 20, "a gigabyte of memory was taken"
        row.happened, row.message = "refused, no code run", shorten(str(caught.value))


def npz(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as pack:
        for name, make in members.items():
            with pack.open(f"{name}.npy", "w", force_zip64=True) as file:
                make(file)


def lying(shape, data=b"1234"):
    def make(file):
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data)
    return make


def zeros(file):
    lying((1 << 30,), b"")(file)
    for _ in range(1 << 6):
        file.write(bytes(1 << 24))


ARRAYS = {
    "object array": lambda path: np.savez(path, indices=np.array([Evil()], dtype=object)),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "pickle as a member": lambda path: npz(path, {"indices": lambda file: file.write(pickle.dumps(Evil()))}),
    "array of a petabyte by its header": lambda path: npz(path, {"indices": lying((1 << 50,))}),
    "array of 8 GB by its header": lambda path: npz(path, {"indices": lying((1 << 33,))}),
    "header that is a program": lambda path: npz(path, {"indices": lambda file: file.write(
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 40) + b"__import__('os').system('touch executed')")}),
    "zip bomb of 1 GB": lambda path: npz(path, {"indices": zeros}),
    "cut off": lambda path: (np.savez(path, indices=np.arange(1000)), path.write_bytes(path.read_bytes()[:-100])),
    "no zip": lambda path: path.write_bytes(bytes(range(256)) * 10),
    "empty": lambda path: path.write_bytes(b""),
}
READ = """
import json, resource, sys
from pathlib import Path
from cupel.images.attacks import PoisonRecord
from cupel.images.stages import read_tensors
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 0
if size: resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 29), size + (1 << 29)))
found = {}
for path in sys.argv[1:]:
    for reader in (read_tensors, PoisonRecord.load):
        try:
            reader(path)
            end = ["read", ""]
        except Exception as error:
            end = [type(error).__name__, str(error)]
        found[f"{Path(path).stem} {reader.__qualname__}"] = [*end, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
print(json.dumps(found))
"""


def test_arrays(tmp_path, mark):
    """In one process that may take half a gigabyte more than it has after its imports."""
    for number, make in enumerate(ARRAYS.values()):
        make(tmp_path / f"{number}.npz")
    names = [str(tmp_path / f"{number}.npz") for number in range(len(ARRAYS))]
    done = subprocess.run([sys.executable, "-c", READ, *names], capture_output=True, text=True, timeout=300, check=False)
    failures = []
    for number, kind in enumerate(ARRAYS):
        for reader, what in (("read_tensors", "trigger"), ("PoisonRecord.load", "poison record")):
            try:
                with trial("checkpoint", f"as an .npz, {kind}", what) as row:
                    assert done.returncode == 0, done.stderr[-500:]
                    error, text, _ = json.loads(done.stdout)[f"{number} {reader}"]
                    assert error != "read" and not mark.exists() and not Path("executed").exists()
                    row.happened = ("ended by the memory limit of the process, no code run" if error == "MemoryError"
                                    else "refused, no code run")
                    row.message = shorten(f"{error}: {text}")
            except AssertionError as error:
                failures.append(f"{kind}, {what}: {error}")
    assert not failures, failures


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def changed(change):
    """The real checkpoint with its own identity and other content; `key` is that of its weights."""
    def make(real, key):
        state = torch.load(io.BytesIO(real), weights_only=True)
        change(state, key)
        return torch_file(state)
    return make


CHECKPOINTS = {
    "pickle by torch.save": lambda real, key: torch_file(Evil()),
    "pickle in a dictionary": lambda real, key: torch_file({"identity": "x", key: Evil()}),
    "pickle": lambda real, key: pickle.dumps(Evil()),
    "old pickle of torch": lambda real, key: legacy(Evil()),
    "cut off": lambda real, key: real[: len(real) // 2],
    "last bytes lost": lambda real, key: real[:-100],
    "a bit turned": lambda real, key: turned(real),
    "zeros, as after a power cut": lambda real, key: bytes(len(real)),
    "empty": lambda real, key: b"",
    "zip bomb": lambda real, key: bomb(),
    "a list": lambda real, key: torch_file([1, 2]),
    "a tensor": lambda real, key: torch_file(torch.zeros(3)),
    "another identity": changed(lambda state, key: state.update(identity="0" * 64)),
    "identity of no text": changed(lambda state, key: state.update(identity=torch.zeros(3))),
    "right identity, another network": changed(lambda state, key: state.update({key: {"evil": torch.zeros(1)}})),
    "right identity, other shapes": changed(lambda state, key: state.update({key: dict.fromkeys(state[key], torch.zeros(1))})),
    "right identity, no optimiser": changed(lambda state, key: state.pop("optimizer")),
    "right identity, no history": changed(lambda state, key: state.pop("history")),
}


def turned(real):
    """A bit of the file's largest record, so of a tensor, is another."""
    with zipfile.ZipFile(io.BytesIO(real)) as pack:
        record = max(pack.infolist(), key=lambda info: info.file_size)
    place = record.header_offset + record.file_size // 2 + 100  # the header and its padding are shorter than the rest
    return real[:place] + bytes([real[place] ^ 1]) + real[place + 1:]


def legacy(content):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.fixture(scope="module", params=TRAININGS)
def trained(request, tmp_path_factory):
    """Kind and weights of an undisturbed training, and a real checkpoint after two of its three epochs."""
    kind, path = request.param, tmp_path_factory.mktemp("real") / "checkpoint.pt"
    expected = train(kind)
    with pytest.raises(KeyboardInterrupt):
        train(kind, path, steps=4)
    assert saved(kind, path.parent) == 2 * TRAININGS[kind].per_epoch
    real = path.read_bytes()
    assert same(train(kind, path), expected)
    return kind, expected, real


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_checkpoint_of_a_training(tmp_path, mark, capsys, trained, damage):
    kind, expected, real = trained
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(CHECKPOINTS[damage](real, TRAININGS[kind].weights))
    with trial("checkpoint", f"as checkpoint.pt of {TRAININGS[kind].what}, {damage}") as row:
        try:
            weights = train(kind, path)
            said = capsys.readouterr().err
            row.message = shorten(next((line for line in said.splitlines() if "starting anew" in line), ""))
            row.happened = "refused, trained anew to the same bits" if row.message else ""
        except DamagedCheckpoint as error:
            assert not path.exists()
            weights = train(kind, path)
            row.happened = "stopped and removed, the next run has the same bits"
            row.message = shorten(str(error))
        assert not mark.exists(), "code of the file was run"
        assert same(weights, expected), "other weights than undisturbed"
        assert row.happened, "it was taken for a checkpoint of this run"


def test_in_the_workflow(undisturbed, tmp_path, monkeypatch):
    """Pickles in the places of a checkpoint and of a victim, in a real run."""
    mark = tmp_path / "executed"
    monkeypatch.setenv(MARK, str(mark))
    folder = copy(undisturbed, tmp_path / "run")
    cell = f"{PURIFIED}/fst@heldout"
    expected = folder.metrics()
    with trial("checkpoint", "in a run, checkpoint.pt of the victim is a pickle") as row:
        outputs = ("metrics.json", "model.safetensors", "history.csv", "trigger.npz")
        remove(folder, cell, *(f"{VICTIM}/{name}" for name in outputs))
        (folder.path / VICTIM / "checkpoint.pt").write_bytes(torch_file(Evil()))
        code, output = folder.run("--", f"{cell}/metrics.json")
        assert code == 0, output[-2000:]
        assert not mark.exists() and not (folder.path / VICTIM / "checkpoint.pt").exists()
        assert folder.metrics() == expected
        log = (folder.path / "logs" / VICTIM.removeprefix("results/") / "victim.log").read_text()
        row.happened = "refused, trained anew to identical results"
        row.message = shorten(next(line for line in log.splitlines() if "starting anew" in line))
    with trial("checkpoint", "in a run, the victim's model.safetensors is a pickle") as row:
        remove(folder, cell)
        (folder.path / VICTIM / "model.safetensors").write_bytes(torch_file(Evil()))
        code, output = folder.run("--", f"{cell}/metrics.json")
        record = json.loads((folder.path / cell / "metrics.json").read_text()) if code == 0 else {"reason": output[-300:]}
        assert not mark.exists() and "pickled" in record["reason"]
        row.message = shorten(record["reason"])
        remove(folder, f"{VICTIM}/model.safetensors", cell)
        code, output = folder.run("--", f"{cell}/metrics.json")
        assert code == 0 and folder.metrics()[f"{cell}/metrics.json"] == expected[f"{cell}/metrics.json"], output[-2000:]
        row.happened = "the cell says why; identical results once the file and the cell are removed"


def test_of_another_machine_or_a_user(tmp_path, mark):
    """A whole, right file passes: the refusals above are not for everything."""
    path = tmp_path / "model.safetensors"
    models.save(network(), path)
    assert os.path.getsize(path) and same(models.load(path).state_dict(), network().state_dict())
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(NotACheckpoint):
        models.load(path)
