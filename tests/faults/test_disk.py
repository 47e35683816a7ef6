"""Folders that cannot be written and disks that fill: a clear error, what was there stays, and the next run finishes.

As root, small file systems in memory are mounted and made full or read-only. Without root, permissions and a limit on the
size of files (RLIMIT_FSIZE) stand in; the row of the table says which.
"""

import contextlib
import resource
import subprocess
import threading

import pytest

from cupel.sources import NoSource, Raw, Source, SourceError, fetch, fetch_raw
from tests.faults.record import shorten, trial
from tests.faults.runs import PURIFIED, VICTIM, content, contents, copy, error_lines, listing, processes_in, remove
from tests.faults.test_kills import DATA, settings_of_data
from tests.test_sources import CONTENT, MD5, Site

CELL = f"{PURIFIED}/fst@heldout"
CHAIN = [f"{VICTIM}/{name}" for name in ("poison.npz", "trigger.npz", "model.safetensors", "history.csv", "metrics.json")]
CHAIN += [f"{CELL}/{name}" for name in ("model.safetensors", "history.csv", "metrics.json")]
FULL, READ_ONLY = "No space left on device", ("Read-only file system", "Permission denied")


@contextlib.contextmanager
def mounted(place, size):
    """A file system in memory of some bytes; what is given is a function that changes its size or options."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextlib.contextmanager
def file_limit(size):
    """No file of what is started meanwhile grows beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without(undisturbed, path, outputs, **settings):
    """A copy without some results, what the others contain, and what the missing ones must be."""
    folder = copy(undisturbed, path, **settings)
    tops = {output.split("/")[0] for output in outputs}
    remove(folder, *outputs)
    there = listing(folder, *(top for top in tops if (folder.path / top).exists()))
    others = contents(folder, sorted(name for name in there if (folder.path / name).is_file()))
    return folder, others


def fails(row, folder, target, words, outputs, wanted, others):
    """A run that must fail, with words that say why, leaving nothing that is cut off."""
    code, output = folder.run("--", target)
    row.message = shorten(error_lines(output, *words) or output[-200:])
    assert code != 0, "the run says that all went well"
    assert any(word in output for word in words), f"the output does not say why: {output[-1500:]}"
    assert not processes_in(folder.path)
    assert contents(folder, others) == others, "what was there has changed"
    there = contents(folder, outputs)
    assert all(there[name] == wanted[name] for name in there), "a result is cut off or wrong"
    return there


def finishes(folder, target, outputs, wanted, others, files=None):
    """The same command again, once there is relief."""
    code, output = folder.run("--", target)
    assert code == 0, output[-2000:]
    assert contents(folder, outputs) == wanted, "other results than undisturbed"
    assert contents(folder, others) == others, "what was there has changed"
    if files is not None:
        found = listing(folder, "results")
        assert found == files, f"left behind: {sorted(found - files)}; missing: {sorted(files - found)}"


END = "clear error, what was there stays, the next run has identical results"


@pytest.mark.parametrize("kilobytes", [40, 150, 300, 480])
def test_results_on_a_disk_that_fills(undisturbed, tmp_path, may_mount, kilobytes):
    """Room for a part of: poison record (57 kB), victim (190 kB), purified model (190 kB)."""
    wanted = contents(undisturbed, CHAIN)
    fault = f"results on a full disk ({'tmpfs' if may_mount else 'RLIMIT_FSIZE stands in'})"
    with trial("disk", fault, f"room for {kilobytes} kB") as row:
        folder, _ = without(undisturbed, tmp_path / "run", ["results"])
        if not may_mount:
            with file_limit(kilobytes * 256):  # the largest file counts, not their sum
                fails(row, folder, f"{CELL}/metrics.json", [FULL, "File too large"], CHAIN, wanted, {})
            finishes(folder, f"{CELL}/metrics.json", CHAIN, wanted, {})
        else:
            with mounted(folder.path / "results", f"{kilobytes}k") as remount:
                there = fails(row, folder, f"{CELL}/metrics.json", [FULL, "No space left"], CHAIN, wanted, {})
                remount("size=50m")
                finishes(folder, f"{CELL}/metrics.json", CHAIN, wanted, there)
                hidden = [path for path in (folder.path / "results").rglob(".*") if path.name != ".snakemake_timestamp"]
                assert not hidden, f"left behind: {hidden}"
        row.happened = END


def test_files_may_not_grow(undisturbed, tmp_path):
    """The stand-in for a full disk, tried everywhere."""
    wanted = contents(undisturbed, CHAIN)
    with trial("disk", "results, files may not grow beyond 100 kB (RLIMIT_FSIZE)") as row:
        folder, others = without(undisturbed, tmp_path / "run", CHAIN)
        with file_limit(100_000):
            fails(row, folder, f"{CELL}/metrics.json", ["File too large"], CHAIN, wanted, others)
        finishes(folder, f"{CELL}/metrics.json", CHAIN, wanted, others, listing(undisturbed, "results"))
        row.happened = END


def test_data_on_a_disk_that_fills(undisturbed, cifar10, tmp_path, may_mount):
    """Room for the images of the test set and a part of the training images."""
    wanted = {name: content(cifar10.parent.parent / name) for name in DATA}
    folder, others = without(undisturbed, tmp_path / "run", [], data=settings_of_data(cifar10))
    fault = f"data on a full disk ({'tmpfs' if may_mount else 'RLIMIT_FSIZE stands in'})"
    with trial("disk", fault, "room for 60 MB of 185") as row:
        with contextlib.ExitStack() as stack:
            if may_mount:
                remount = stack.enter_context(mounted(folder.path / "data", "60m"))
                fails(row, folder, DATA[-1], [FULL], DATA, wanted, others)
                left = sum(path.stat().st_size for path in (folder.path / "data").rglob("*") if path.is_file())
                assert left < 1e5, f"{left} bytes are left on the full disk"
                remount("size=600m")
            else:
                with file_limit(60_000_000):
                    fails(row, folder, DATA[-1], [FULL, "File too large", "requested and"], DATA, wanted, others)
            finishes(folder, DATA[-1], DATA, wanted, others)
        row.happened = END


def test_the_whole_folder_on_a_full_disk(undisturbed, tmp_path, may_mount):
    """Neither results nor notes of Snakemake nor logs find room."""
    if not may_mount:
        pytest.skip("a full disk needs the right to mount")
    wanted = contents(undisturbed, CHAIN)
    with mounted(tmp_path / "disk", "100m") as remount:
        folder, others = without(undisturbed, tmp_path / "disk" / "run", CHAIN)
        with trial("disk", "the run's whole folder on a full disk (tmpfs)", "no room at all") as row:
            filler = folder.path / "filler"
            with contextlib.suppress(OSError), open(filler, "wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
            fails(row, folder, f"{CELL}/metrics.json", [FULL], CHAIN, wanted, others)
            filler.unlink()
            finishes(folder, f"{CELL}/metrics.json", CHAIN, wanted, others, listing(undisturbed, "results"))
            row.happened = END
        remount("size=50m")


@contextlib.contextmanager
def unwritable(path, mount):
    """Read-only as a file system, or by its mode; what is in it stays."""
    if mount:
        subprocess.run(["mount", "--bind", path, path], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", path], check=True)
        return
    modes = {top: top.stat().st_mode for top in [path, *(below for below in path.rglob("*") if below.is_dir())]}
    for top in modes:
        top.chmod(0o555)
    try:
        yield
    finally:
        for top, mode in modes.items():
            top.chmod(mode)


@pytest.mark.parametrize("place", ["results", "the victim's folder", "logs", "the notes of Snakemake", "the whole folder"])
def test_unwritable(undisturbed, tmp_path, may_mount, place):
    wanted = contents(undisturbed, CHAIN)
    folder, others = without(undisturbed, tmp_path / "run", CHAIN)
    path = folder.path / {"results": "results", "the victim's folder": VICTIM, "logs": "logs",
                          "the notes of Snakemake": ".snakemake", "the whole folder": "."}[place]
    (folder.path / VICTIM).mkdir(parents=True, exist_ok=True)
    with trial("disk", f"unwritable: {place}", "read-only mount" if may_mount else "by its mode") as row:
        with unwritable(path.resolve(), may_mount):
            fails(row, folder, f"{CELL}/metrics.json", READ_ONLY, CHAIN, wanted, others)
        finishes(folder, f"{CELL}/metrics.json", CHAIN, wanted, others, listing(undisturbed, "results"))
        row.happened = END


def test_a_file_in_the_place_of_results(undisturbed, tmp_path):
    wanted = contents(undisturbed, CHAIN)
    folder, _ = without(undisturbed, tmp_path / "run", ["results"])
    with trial("disk", "a file stands where the folder of results should be") as row:
        (folder.path / "results").write_text("mine")
        fails(row, folder, f"{CELL}/metrics.json", ["File exists", "Not a directory"], [], wanted, {})
        assert (folder.path / "results").read_text() == "mine"
        (folder.path / "results").unlink()
        finishes(folder, f"{CELL}/metrics.json", CHAIN, wanted, {})
        row.happened = END


@pytest.mark.parametrize("kind", ["unwritable", "full"])
def test_the_cache(tmp_path, may_mount, kind):
    """Downloads that find no place, and again when there is one."""
    if not may_mount and kind == "full":
        pytest.skip("a full disk needs the right to mount")
    cache = tmp_path / "cache"
    cache.mkdir()
    with Site() as site, trial("disk", f"{kind}: the cache of downloads", "tmpfs" if kind == "full" else "read-only") as row:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            raw = Raw("file", MD5, site.url())
            with mounted(cache, "200k") if kind == "full" else unwritable(cache, may_mount):
                with pytest.raises((SourceError, OSError)) as caught:
                    fetch_raw(raw, cache)
                row.message = shorten(str(caught.value))
                assert any(word in str(caught.value) for word in (FULL, *READ_ONLY)) and not (cache / "file").exists()
                with pytest.raises(NoSource, match="|".join((FULL, *READ_ONLY))):
                    fetch("d", [Source("official", (raw,), lambda paths: {})], cache=cache)
            assert fetch_raw(raw, cache).read_bytes() == CONTENT
        finally:
            site.shutdown()
            thread.join()
        row.happened = "clear error, right file once there is room"
