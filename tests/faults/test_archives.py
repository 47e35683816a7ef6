"""Archives made to write elsewhere or to fill the disk: nothing but the bytes of the member asked for is taken."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from cupel.archives import contents
from tests.faults.record import shorten, trial

EVIL = b"evil"


def tar(path, *members, mode="w:gz"):
    """Members: (name, type, link, declared size or None)."""
    with tarfile.open(path, mode) as pack:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode, info.devmajor, info.devminor = kind, link, 0o6777, 1, 3
            info.size = len(EVIL) if kind == tarfile.REGTYPE else 0
            pack.addfile(info, io.BytesIO(EVIL) if info.size else None)


REG, SYM, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
TARS = {
    "..": [("../member", REG, "")],
    "many ..": [("../" * 12 + "tmp/member", REG, "")],
    "absolute path": [("/tmp/member", REG, "")],
    "symbolic link": [("member", SYM, "/etc/passwd")],
    "symbolic link, then a file through it": [("there", SYM, "/tmp"), ("there/member", REG, "")],
    "symbolic link of the name, then the file": [("member", SYM, "/etc/hostname"), ("member", REG, "")],
    "hard link": [("other", REG, ""), ("member", HARD, "/etc/passwd")],
    "character device": [("member", tarfile.CHRTYPE, "")],
    "block device": [("member", tarfile.BLKTYPE, "")],
    "pipe": [("member", tarfile.FIFOTYPE, "")],
    "folder": [("member", tarfile.DIRTYPE, "")],
    "duplicate names": [("member", REG, ""), ("member", REG, "")],
}


def outside(folder):
    """All that could have been written."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


def attempt(row, archive, member, top, limit=1 << 20):
    """What comes out, with nothing written."""
    before, found = outside(top), None
    try:
        [(_, found)] = contents(archive, [member], limit)
        row.happened = "only the bytes taken"
        assert len(found) <= limit
    except ValueError as error:
        row.message, row.happened = shorten(str(error)), "refused"
    assert outside(top) == before, "something was written"
    return found


@pytest.mark.parametrize("kind", TARS)
def test_tar(tmp_path, kind):
    archive = tmp_path / "archive.tar.gz"
    tar(archive, *TARS[kind])
    with trial("archive", f"tar: {kind}", "data set") as row:
        found = attempt(row, archive, TARS[kind][-1][0], tmp_path)
        assert found in (None, EVIL) and (found is None) == (TARS[kind][-1][1] != REG)
        assert not Path("/tmp/member").exists()


def zipped(path, *members):
    with zipfile.ZipFile(path, "w") as pack:
        for name, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            pack.writestr(info, EVIL)


ZIPS = {"..": [("../member", 0o666)], "many ..": [("../" * 12 + "tmp/member", 0o666)],
        "absolute path": [("/tmp/member", 0o666)], "symbolic link": [("member", 0o120777)],
        "device": [("member", 0o020777)], "backslashes": [("..\\member", 0o666)],
        "duplicate names": [("member", 0o666), ("member", 0o666)]}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ZIPS)
def test_zip(tmp_path, kind):
    archive = tmp_path / "archive.zip"
    zipped(archive, *ZIPS[kind])
    with trial("archive", f"zip: {kind}", "data set") as row:
        assert attempt(row, archive, ZIPS[kind][-1][0], tmp_path) in (None, EVIL)
        assert not Path("/tmp/member").exists()


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("member", bytes(1 << 26))


def lying_zip(path):
    """4 bytes by the directory, 64 MiB by the stream."""
    bomb(path)
    raw = bytearray(path.read_bytes())
    where = raw.rindex(b"PK\1\2")
    raw[where + 24: where + 28] = struct.pack("<I", 4)
    path.write_bytes(raw)


def huge_zip(path):
    """Four gigabytes by the directory, four bytes by the stream."""
    zipped(path, ("member", 0o666))
    raw = bytearray(path.read_bytes())
    where = raw.rindex(b"PK\1\2")
    raw[where + 20: where + 28] = struct.pack("<II", 0xFFFFFFFE, 0xFFFFFFFE)
    path.write_bytes(raw)


def huge_tar(path):
    """A terabyte by the header, four bytes in the file."""
    info = tarfile.TarInfo("member")
    info.size = 1 << 40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + EVIL)


def bomb_tar(path):
    with tarfile.open(path, "w:gz") as pack:
        info = tarfile.TarInfo("member")
        info.size = 1 << 26
        pack.addfile(info, io.BytesIO(bytes(1 << 26)))


def sparse_tar(path):
    """A file of holes, a gigabyte long, in some bytes of archive."""
    info = tarfile.TarInfo("member")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:398], header[398:410] = b"%011o\0" % (1 << 30), b"%011o\0" % 0  # one block of nothing, at the end
    header[483:495] = b"%011o\0" % (1 << 30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(1024))


def cut(make):
    def made(path):
        make(path)
        path.write_bytes(path.read_bytes()[:-40])
    return made


SIZES = {"zip: bomb": bomb, "zip: more in the stream than declared": lying_zip, "zip: huge declared size": huge_zip,
         "tar: huge declared size": huge_tar, "tar: bomb": bomb_tar, "tar: holes": sparse_tar, "tar: cut off": cut(bomb_tar),
         "zip: cut off": cut(bomb), "neither zip nor tar": lambda path: path.write_bytes(b"\x1f\x8b" + bytes(range(256)) * 9),
         "empty file": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("kind", SIZES)
def test_sizes(tmp_path, kind):
    archive = tmp_path / "archive"
    SIZES[kind](archive)
    for limit in (1 << 20, 1 << 41):
        if limit > 1 << 20 and kind in ("zip: bomb", "tar: bomb", "tar: holes"):
            continue  # as large as allowed
        (tmp_path / str(limit)).mkdir()
        with trial("archive", kind, f"limit {limit:,} bytes") as row:
            assert attempt(row, archive, "member", tmp_path / str(limit), limit) is None
