"""Fetching raw files: every way a download goes wrong ends in the right bytes or in a clear refusal."""

import contextlib
import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from cupel import archives, sources
from cupel.sources import Apt, Hub, NoSource, Npm, Pip, Raw, Source, SourceError, Url, fetch, fetch_raw

CONTENT = bytes(range(256)) * 4000
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Site(http.server.ThreadingHTTPServer):
    """A site on this machine with one file: /right, and the ways of a real one to fail."""

    ranges = True       # whether it supports continued downloads
    cut = 0             # bytes after which it hangs up, as often as `cuts` says
    cuts = 0
    content = CONTENT
    encoding = ""       # value of Content-Encoding it adds
    wait = 0.0          # seconds before the answer

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked = []

    def url(self, path="right"):
        return Url(f"http://127.0.0.1:{self.server_port}/{path}")


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        wanted = self.headers.get("Range")
        site.asked.append(wanted)
        time.sleep(site.wait)
        if self.path != "/right":
            self.send_error(404)
            return
        start = int(wanted[len("bytes="):-1]) if wanted and site.ranges else 0
        if start >= len(site.content):
            self.send_error(416)
            return
        self.send_response(206 if wanted and site.ranges else 200)
        body = site.content[start:]
        self.send_header("Content-Length", str(len(body)))
        if site.encoding:
            self.send_header("Content-Encoding", site.encoding)
        self.end_headers()
        if site.cuts:
            site.cuts -= 1
            body = body[: site.cut]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def site():
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def reading(paths):
    return {"bytes": b"".join(path.read_bytes() for path in paths)}


def partial(cache, name="file"):
    return cache / f"{name}.part"


def test_a_file_is_fetched_once(site, tmp_path):
    raw = Raw("file", MD5, site.url())
    assert fetch_raw(raw, tmp_path).read_bytes() == CONTENT
    assert fetch_raw(raw, tmp_path).read_bytes() == CONTENT
    assert site.asked == [None] and not partial(tmp_path).exists()


def test_an_interrupted_download_is_continued_by_the_next_call(site, tmp_path):
    partial(tmp_path).write_bytes(CONTENT[:1000])
    assert fetch_raw(Raw("file", MD5, site.url()), tmp_path).read_bytes() == CONTENT
    assert site.asked == ["bytes=1000-"]


def test_a_cut_line_is_taken_up_again(site, tmp_path):
    site.cut, site.cuts = 300_000, 2
    assert fetch_raw(Raw("file", MD5, site.url()), tmp_path).read_bytes() == CONTENT
    assert site.asked == [None, "bytes=300000-", "bytes=600000-"]


def test_a_line_that_brings_nothing_more_is_given_up_and_continued_later(site, tmp_path):
    raw = Raw("file", MD5, site.url())
    partial(tmp_path).write_bytes(CONTENT[:1000])
    site.cut, site.cuts = 0, 1
    with pytest.raises(SourceError):
        fetch_raw(raw, tmp_path)
    assert partial(tmp_path).stat().st_size == 1000 and not (tmp_path / "file").exists()
    assert fetch_raw(raw, tmp_path).read_bytes() == CONTENT
    assert site.asked[-1] == "bytes=1000-"


def test_a_site_without_ranges_starts_again(site, tmp_path):
    site.ranges = False
    partial(tmp_path).write_bytes(CONTENT[:1000])
    assert fetch_raw(Raw("file", MD5, site.url()), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"", CONTENT[:10], CONTENT], ids=["empty", "beginning", "whole"])
def test_what_was_left_behind_is_used(site, tmp_path, left):
    partial(tmp_path).write_bytes(left)
    assert fetch_raw(Raw("file", MD5, site.url()), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("junk", [b"<html>login</html>", b"\0" * len(CONTENT), CONTENT + b"more"],
                         ids=["other beginning", "as long", "longer"])
def test_a_wrong_part_does_not_poison(site, tmp_path, junk):
    partial(tmp_path).write_bytes(junk)
    assert fetch_raw(Raw("file", MD5, site.url()), tmp_path).read_bytes() == CONTENT
    assert site.asked[-1] is None


def test_a_wrong_file_is_refused_and_removed(site, tmp_path):
    raw, site.content = Raw("file", MD5, site.url()), b"another file"
    with pytest.raises(SourceError, match=r"wrong checksum: md5:\w+ instead of md5:"):
        fetch_raw(raw, tmp_path)
    assert not partial(tmp_path).exists() and not (tmp_path / "file").exists()
    site.content = CONTENT
    assert fetch_raw(raw, tmp_path).read_bytes() == CONTENT


def test_bytes_are_taken_as_stored(site, tmp_path):
    """Some sites label a .gz file as an encoding, which a client would undo; the checksum is that of the .gz."""
    import gzip

    site.content, site.encoding = gzip.compress(CONTENT), "x-gzip"
    raw = Raw("file.gz", "sha256:" + hashlib.sha256(site.content).hexdigest(), site.url())
    assert fetch_raw(raw, tmp_path).read_bytes() == site.content


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"\1" + b[1:], lambda b: b + b"\0"],
                         ids=["cut", "empty", "changed", "longer"])
def test_a_damaged_cache_is_fetched_again(site, tmp_path, damage):
    (tmp_path / "file").write_bytes(damage(CONTENT))
    assert fetch_raw(Raw("file", MD5, site.url()), tmp_path).read_bytes() == CONTENT


def test_a_damaged_cache_is_not_used_without_network(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT[:-1])
    with pytest.raises(SourceError):
        fetch_raw(Raw("file", MD5, Url("http://127.0.0.1:9/file")), tmp_path)


def test_exchanged_files_in_the_cache_are_detected(site, tmp_path):
    other = b"the other file"
    first, second = Raw("a", MD5, site.url()), Raw("b", "md5:" + hashlib.md5(other).hexdigest(), site.url("gone"))
    (tmp_path / "a").write_bytes(other)
    (tmp_path / "b").write_bytes(CONTENT)
    assert fetch_raw(first, tmp_path).read_bytes() == CONTENT
    with pytest.raises(SourceError, match="404"):
        fetch_raw(second, tmp_path)


def test_files_of_one_name_are_kept_apart_by_a_folder(site, tmp_path):
    site.content = CONTENT
    path = fetch_raw(Raw("one/file", MD5, site.url()), tmp_path)
    assert path == tmp_path / "one/file" and path.read_bytes() == CONTENT


def test_a_wrong_source_goes_on_to_the_next(site, tmp_path):
    (tmp_path / "mirror/deep").mkdir(parents=True)
    (tmp_path / "mirror/file").write_bytes(b"same name, other file")
    (tmp_path / "mirror/deep/file").write_bytes(CONTENT)
    site.content = b"wrong"
    offered = [Source("official", (Raw("file", MD5, site.url()),), reading)]
    source, content = fetch("d", offered, cache=tmp_path / "cache", mirror=tmp_path / "mirror")
    assert source.kind == "mirror" and content == {"bytes": CONTENT}


def test_a_source_whose_content_is_not_accepted_goes_on_to_the_next(site, tmp_path):
    def refuse(paths):
        raise ValueError("not the dataset")

    raw = Raw("file", MD5, site.url())
    offered = [Source("official", (raw,), refuse), Source("package", (raw,), reading)]
    assert fetch("d", offered, cache=tmp_path)[0].kind == "package"
    with pytest.raises(NoSource, match=f"official: {tmp_path / 'file'}: not used: not the dataset"):
        fetch("d", offered[:1], cache=tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("Not enough free space to write 9 bytes")])
def test_a_full_disk_is_no_fault_of_the_source(site, tmp_path, error):
    def full(content):
        raise error

    offered = [Source(kind, (Raw("file", MD5, site.url()),), reading) for kind in ("official", "package")]
    with pytest.raises(OSError, match="No space left on device to prepare the dataset d") as caught:
        fetch("d", offered, cache=tmp_path, accept=full)
    assert caught.value.errno == 28 and not isinstance(caught.value, NoSource)


def test_sources_are_tried_in_the_order_of_the_config(site, tmp_path):
    raw = Raw("file", MD5, site.url())
    offered = [Source(kind, (raw,), reading) for kind in ("official", "package")]
    assert fetch("d", offered, kinds=("package", "official"), cache=tmp_path)[0].kind == "package"
    assert fetch("d", offered, kinds=("mirror", "package"), cache=tmp_path)[0].kind == "mirror"
    with pytest.raises(ValueError, match="'offical': the kinds are official, hub, package, mirror"):
        fetch("d", offered, kinds=("offical",), cache=tmp_path)


def test_the_message_says_what_failed_and_what_to_put_where(site, tmp_path):
    gone = (Raw("a.zip", MD5, site.url("gone")), Raw("b.zip", MD5, site.url()))
    offered = [
        Source("official", gone, reading),
        Source("package", (Raw("c.tgz", "sha256:00", site.url()),), reading),
    ]
    with pytest.raises(NoSource) as caught:
        fetch("signs", offered, cache=tmp_path)
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert str(caught.value) == "\n".join([
        "dataset signs: no source gave it. Tried, in the order of data.sources (official, hub, package, mirror):",
        f"  official: {site.url('gone')}: HTTPError: 404 Client Error: Not Found for url: {site.url('gone')}",
        f"  package: {site.url()}: wrong checksum: sha256:{digest} instead of sha256:00",
        "  mirror: a.zip: data.mirror is not set",
        "  mirror: c.tgz: data.mirror is not set",
        f"To go on without network, put the files of one of these lines into {tmp_path}:",
        f"  a.zip ({MD5}) and b.zip ({MD5})",
        "  c.tgz (sha256:00)",
        "or set data.mirror in config.yaml to a folder that has them, then run the same command again.",
    ])


def test_the_message_knows_the_kinds_asked_for(tmp_path):
    offered = [Source("official", (Raw("a", MD5, Url("http://127.0.0.1:9/a")),), reading)]
    with pytest.raises(NoSource, match="and add mirror to data\\.sources"):
        fetch("d", offered, kinds=("official",), cache=tmp_path)
    with pytest.raises(NoSource, match="nothing: no source of these kinds is known"):
        fetch("d", offered, kinds=("hub",), cache=tmp_path)


def test_a_file_of_the_user_in_the_cache_is_enough(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    for raw in (Raw("a", MD5, Url("http://127.0.0.1:9/a")), Raw("a", MD5)):
        assert fetch("d", [Source("mirror", (raw,), reading)], cache=tmp_path)[1] == {"bytes": CONTENT}


@pytest.mark.parametrize("name", ["a[1].zip", "a?", "*"])
def test_the_mirror_is_searched_for_the_very_name(tmp_path, name):
    (tmp_path / "other").write_bytes(CONTENT)
    with pytest.raises(SourceError, match="no file"):
        fetch_raw(Raw(name, MD5), tmp_path / "cache", tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).write_bytes(CONTENT)
    assert fetch_raw(Raw(name, MD5), tmp_path / "cache", tmp_path) == tmp_path / "deep" / name


def test_mirror_errors_name_the_files(tmp_path):
    raw = Raw("sub/a", MD5)
    with pytest.raises(SourceError, match="is no folder"):
        fetch_raw(raw, tmp_path / "cache", tmp_path / "nowhere")
    with pytest.raises(SourceError, match=f"no file a in {tmp_path}"):
        fetch_raw(raw, tmp_path / "cache", tmp_path)
    (tmp_path / "a").write_bytes(b"wrong")
    with pytest.raises(SourceError, match=f"{tmp_path / 'a'}: another checksum than {MD5}"):
        fetch_raw(raw, tmp_path / "cache", tmp_path)


@pytest.mark.parametrize("origin", [Url("http://127.0.0.1:9/a"), Url("http://nowhere.invalid/a"),
                                    Hub("a/b", "c", "main")], ids=["refused", "no name", "hub"])
def test_without_network_the_answer_comes_within_seconds(tmp_path, monkeypatch, origin):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(SourceError, match=r"ConnectionError: .*(refused|resolve)"):
        fetch_raw(Raw("a", MD5, origin), tmp_path)
    assert time.perf_counter() - start < 8


def another_process(site, cache):
    """A process that fetches the file."""
    program = ("import sys\nfrom pathlib import Path\nfrom cupel.sources import Raw, Url, fetch_raw\n"
               "fetch_raw(Raw('file', sys.argv[1], Url(sys.argv[2])), Path(sys.argv[3]))")
    return subprocess.Popen([sys.executable, "-c", program, MD5, str(site.url()), str(cache)])


def test_three_processes_download_once(site, tmp_path):
    site.wait = 0.5
    running = [another_process(site, tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert (tmp_path / "file").read_bytes() == CONTENT and site.asked == [None]


def test_a_killed_download_leaves_no_lock(site, tmp_path):
    site.wait = 1.5
    process = another_process(site, tmp_path)
    while not site.asked:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    site.wait = 0
    assert fetch_raw(Raw("file", MD5, site.url()), tmp_path).read_bytes() == CONTENT


def test_a_hub_file_leaves_nothing_else(site, tmp_path, monkeypatch):
    import huggingface_hub

    def download(repository, file, *, revision, repo_type, local_dir, etag_timeout):
        assert (repository, file, revision, repo_type) == ("a/b", "data/c.parquet", "0123", "dataset")
        (local_dir / "data").mkdir(parents=True)
        (local_dir / file).write_bytes(CONTENT)
        return str(local_dir / file)

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", str(site.url()))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    raw = Raw("c.parquet", MD5, Hub("a/b", "data/c.parquet", "0123"))
    assert fetch_raw(raw, tmp_path).read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".c.parquet.lock", "c.parquet"]


@pytest.fixture
def client(monkeypatch):
    """A stand-in for the package clients: keeps the command, leaves the files given, ends with the status given."""
    def install(files, status=0, stderr=""):
        def run(command, cwd, **_):
            called.append(command)
            for name in files:
                (Path(cwd) / name).write_bytes(CONTENT)
            return subprocess.CompletedProcess(command, status, "", stderr)

        monkeypatch.setattr(sources.subprocess, "run", run)
        monkeypatch.setattr(sources.shutil, "which", lambda name: name)
        called = []
        return called

    return install


@pytest.mark.parametrize("origin, start", [
    (Npm("p@1"), ["npm", "pack", "p@1", "--ignore-scripts"]),
    (Pip("p==1"), [sys.executable, "-m", "pip", "download"]),
    (Pip("p==1", sdist=True), [sys.executable, "-m", "pip", "download"]),
    (Apt("p"), ["apt-get", "download"]),
], ids=["npm", "wheel", "sdist", "apt"])
def test_package_clients(client, tmp_path, origin, start):
    called = client(["p-1.tgz"])
    assert fetch_raw(Raw("p.tgz", MD5, origin), tmp_path).read_bytes() == CONTENT
    assert called[0][: len(start)] == start and any(origin.package in word for word in called[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".p.tgz.lock", "p.tgz"]


def test_package_clients_that_fail(client, tmp_path, monkeypatch):
    raw = Raw("p.tgz", MD5, Npm("p@1"))
    client([], 1, "npm error code E404\nnpm error 404 Not Found\n\nnpm error\nA complete log is in x\n")
    with pytest.raises(SourceError, match=r"npm pack p@1 failed: npm error code E404; npm error 404 Not Found"):
        fetch_raw(raw, tmp_path)
    client(["a", "b"])
    with pytest.raises(SourceError, match="npm package p@1 gave 2 files instead of one"):
        fetch_raw(raw, tmp_path)

    def late(*_, **__):
        raise subprocess.TimeoutExpired("npm", 1)

    monkeypatch.setattr(sources.subprocess, "run", late)
    with pytest.raises(SourceError, match="npm pack gave no answer within 30 minutes"):
        fetch_raw(raw, tmp_path)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(SourceError, match="the program npm is not installed"):
        fetch_raw(raw, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".p.tgz.lock"]


def archive_tar(path):
    with tarfile.open(path, "w:gz") as pack:
        for name, kind, link in (("../evil", tarfile.REGTYPE, ""), ("/abs", tarfile.REGTYPE, ""),
                                 ("soft", tarfile.SYMTYPE, "/etc/passwd"), ("hard", tarfile.LNKTYPE, "../evil"),
                                 ("folder", tarfile.DIRTYPE, ""), ("pipe", tarfile.FIFOTYPE, "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, link, 0o6777
            info.size = 4 if kind == tarfile.REGTYPE else 0
            pack.addfile(info, io.BytesIO(b"evil") if info.size else None)


def archive_zip(path):
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("../evil", b"evil")
        pack.writestr("/abs", b"evil")


@pytest.mark.parametrize("make", [archive_tar, archive_zip])
def test_archives_give_regular_files_and_write_nothing(tmp_path, make):
    archive = tmp_path / "archive"
    make(archive)
    assert archives.names(archive) == ["../evil", "/abs"]
    assert archives.read(archive, "/abs", "../evil") == [b"evil", b"evil"]
    for member in ("soft", "hard", "folder", "pipe", "evil"):
        with pytest.raises(ValueError, match=f"1 members are missing or no regular files, the first is {member}"):
            archives.read(archive, "/abs", member)
    with pytest.raises(ValueError, match="4 bytes, more than the 3 expected"):
        list(archives.contents(archive, ["../evil"], limit=3))
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged, encrypted or no archive"):
        archives.names(archive)
    assert list(tmp_path.iterdir()) == [archive]
