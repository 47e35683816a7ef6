"""Downloads that go wrong: the right bytes or a clear refusal, never wrong bytes under the name, and recovery by itself."""

import contextlib
import hashlib
import http.server
import subprocess
import sys
import threading
import time

import pytest

from cupel.sources import Raw, Source, SourceError, Url, fetch, fetch_raw
from tests.faults.record import shorten, trial

CONTENT = bytes(range(256)) * 4000
OTHER = bytes(reversed(range(256))) * 4000
CHECKSUM = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers as `server.fault` says, and rightly where it is empty."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        fault = self.server.fault
        self.server.asked += 1
        wanted = self.headers.get("Range")
        start = int(wanted[len("bytes="):-1]) if wanted and fault != "no ranges" else 0
        body, length, status = CONTENT[start:], None, 206 if start else 200
        self.close_connection = True
        if fault.startswith("redirect"):
            self.send_response(302)
            self.send_header("Location", "/b" if self.path == "/file" and "two" in fault else "/file")
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return
        if fault.isdigit():
            body, status = b"<html>an error</html>", int(fault)
        elif fault == "another file":
            body, status = OTHER[start:], 206 if start else 200
        elif fault == "a page to log in":
            body, status = b"<html>please log in</html>", 200
        elif fault == "cut, and the length says so":
            body, status = CONTENT[: len(CONTENT) // 2], 200
        elif fault == "length too long":
            length = len(body) + 1000
        elif fault == "length too short":
            length = len(body) - 1000
        elif fault == "ranges of another place":
            body = CONTENT[max(0, start - 100):][: len(body)]
        elif fault == "a bit turned":
            body = body[:1000] + bytes([body[1000] ^ 1]) + body[1001:] if len(body) > 1000 else body
        elif fault == "nothing at all":
            return
        elif fault == "nonsense for a status line":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(b"\x16\x03\x01 nonsense\r\n\r\n")
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")
        self.end_headers()
        if fault.startswith("dies in the middle"):
            # a third of what is left each time, or always the same beginning
            body = body[: max(len(body) // 3, 1)] if "once" not in fault else b"" if self.server.asked > 1 else body[:1000]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[:length])

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.fault, server.asked = "", 0
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


FAULTS = ["cut, and the length says so", "length too long", "length too short", "another file", "a page to log in",
          "a bit turned", "dies in the middle, again and again", "dies in the middle once, then sends nothing",
          "ranges of another place", "no ranges", "nothing at all", "nonsense for a status line", "redirect to itself",
          "redirect between two", "404", "403", "500", "503"]
BEGUN = {"from nothing": b"", "after a part of it": CONTENT[:50_000], "after a part of another": OTHER[:50_000]}


def raw(site, name="file"):
    return Raw(name, CHECKSUM, Url(f"http://127.0.0.1:{site.server_port}/file"))


@pytest.mark.parametrize("begun", BEGUN)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server(site, tmp_path, fault, begun):
    if BEGUN[begun]:
        (tmp_path / "file.part").write_bytes(BEGUN[begun])
    site.fault = fault
    with trial("download", f"server: {fault}", begun) as row:
        start = time.monotonic()
        try:
            assert fetch_raw(raw(site), tmp_path).read_bytes() == CONTENT
            row.happened = "right file"
        except SourceError as error:
            row.message = shorten(str(error))
            assert not (tmp_path / "file").exists(), "a wrong file stands under the name"
            site.fault = ""
            assert fetch_raw(raw(site), tmp_path).read_bytes() == CONTENT
            row.happened = "refused; right file once the server is well"
        assert time.monotonic() - start < 60 and site.asked < 100
        assert sorted(path.name for path in tmp_path.iterdir()) == [".file.lock", "file"]


def test_a_server_that_is_killed_in_the_middle(tmp_path):
    """A process of its own, kill -9 while it sends; then there is no server; then there is one again."""
    program = ("import http.server, sys, time\n"
               "class A(http.server.BaseHTTPRequestHandler):\n"
               "    def do_GET(self):\n"
               f"        self.send_response(200); self.send_header('Content-Length', '{len(CONTENT)}'); self.end_headers()\n"
               "        self.wfile.write((bytes(range(256)) * 4000)[:300000]); self.wfile.flush(); print('sent', flush=True)\n"
               "        time.sleep(60)\n"
               "s = http.server.HTTPServer(('127.0.0.1', 0), A); print(s.server_port, flush=True); s.serve_forever()\n")
    with trial("download", "server: killed while it sends") as row:
        server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        url = Url(f"http://127.0.0.1:{int(server.stdout.readline())}/file")

        def kill():
            server.stdout.readline()
            deadline = time.monotonic() + 20  # until what was sent has been taken
            while time.monotonic() < deadline and not (tmp_path / "file.part").exists():
                time.sleep(0.02)
            server.kill()
            server.wait()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(SourceError) as caught:
            fetch_raw(Raw("file", CHECKSUM, url), tmp_path)
        killer.join()
        row.message = shorten(str(caught.value))
        assert not (tmp_path / "file").exists()
        kept = (tmp_path / "file.part").stat().st_size if (tmp_path / "file.part").exists() else 0
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as again:
            again.fault, again.asked = "", 0
            threading.Thread(target=again.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            assert fetch_raw(raw(again), tmp_path).read_bytes() == CONTENT
            again.shutdown()
        row.happened = "refused; right file once the server is well"
        row.lost = "none" if kept == 300_000 else f"{300 - kept // 1000} kB of the download"


def test_a_client_that_is_killed(site, tmp_path):
    """kill -9 of the process that downloads, then again from another."""
    program = ("import sys\nfrom pathlib import Path\nfrom cupel.sources import Raw, Url, fetch_raw\n"
               "fetch_raw(Raw('file', sys.argv[1], Url(sys.argv[2])), Path(sys.argv[3]))")
    site.fault = ""
    with trial("download", "client: killed in the middle") as row:
        before = site.asked
        process = subprocess.Popen([sys.executable, "-c", program, CHECKSUM, str(raw(site).origin), str(tmp_path)])
        while site.asked == before and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (tmp_path / "file").exists() or (tmp_path / "file").read_bytes() == CONTENT
        assert fetch_raw(raw(site), tmp_path).read_bytes() == CONTENT
        row.happened = "the next process has the right file"


DAMAGE = {"truncated": lambda b: b[: len(b) // 2], "emptied": lambda b: b"", "a bit turned": lambda b: b"\1" + b[1:],
          "longer": lambda b: b + b"\0", "another file of that size": lambda b: OTHER}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_in_the_cache(site, tmp_path, damage):
    fetch_raw(raw(site), tmp_path)
    (tmp_path / "file").write_bytes(DAMAGE[damage](CONTENT))
    with trial("download", f"cache: {damage}", "with network") as row:
        assert fetch_raw(raw(site), tmp_path).read_bytes() == CONTENT
        row.happened = "noticed, fetched again"
    (tmp_path / "file").write_bytes(DAMAGE[damage](CONTENT))
    site.fault = "503"
    with trial("download", f"cache: {damage}", "without network") as row:
        with pytest.raises(SourceError) as caught:
            fetch_raw(raw(site), tmp_path)
        row.happened, row.message = "noticed, refused", shorten(str(caught.value))


def test_two_files_of_the_cache_exchanged(site, tmp_path):
    other = Raw("other", "md5:" + hashlib.md5(OTHER).hexdigest())
    (tmp_path / "file").write_bytes(OTHER)
    (tmp_path / "other").write_bytes(CONTENT)
    with trial("download", "cache: two valid files exchanged") as row:
        assert fetch_raw(raw(site), tmp_path).read_bytes() == CONTENT
        with pytest.raises(SourceError) as caught:
            fetch_raw(other, tmp_path)
        row.happened, row.message = "noticed, fetched again or refused", shorten(str(caught.value))


def test_the_next_source_is_taken(site, tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "file").write_bytes(CONTENT)
    for fault in FAULTS:
        site.fault = fault
        with trial("download", "first source fails, a second is there", fault) as row:
            read = lambda paths: {"bytes": paths[0].read_bytes()}  # noqa: E731
            offered = [Source("official", (raw(site),), read), Source("mirror", (Raw("file", CHECKSUM),), read)]
            cache = tmp_path / fault.replace(" ", "_").replace(",", "")
            source, content = fetch("d", offered, cache=cache, mirror=tmp_path / "mirror")
            assert content["bytes"] == CONTENT
            row.happened = "right file from the second" if source.kind == "mirror" else "right file from the first"
