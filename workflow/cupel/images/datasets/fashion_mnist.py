"""Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 grey images of 28×28 articles of clothing, in MNIST's form."""

import gzip
import tempfile
from pathlib import Path

import numpy as np

from cupel import archives
from cupel.images.datasets.base import Description
from cupel.images.datasets.mnist import STEMS, arrays, read_official
from cupel.sources import Apt, Raw, Source, Url


def ar_members(content: bytes) -> dict[str, bytes]:
    """Members of a Unix `ar` archive with short names, the outer form of a Debian package.

    After the magic line each member has a header of 60 bytes (name in the first 16, decimal size in 10 from byte 48,
    the end mark in the last two) and its data, padded to an even length.

    Raises:
        ValueError: not such an archive, or cut off.
    """
    if not content.startswith(b"!<arch>\n"):
        raise ValueError("not an ar archive")
    members, at = {}, 8
    while at < len(content):
        header = content[at : at + 60]
        if len(header) < 60 or header[58:] != b"`\n":
            raise ValueError(f"no ar header at byte {at}")
        name, size = header[:16].decode("ascii").rstrip().rstrip("/"), int(header[48:58])
        data = content[at + 60 : at + 60 + size]
        if len(data) < size:
            raise ValueError(f"ar member {name} has {len(data)} bytes instead of {size}")
        members[name] = data
        at += 60 + size + size % 2
    return members


def read_package(paths: list[Path]) -> dict[str, np.ndarray]:
    """The same four files out of a Debian package."""
    members = ar_members(paths[0].read_bytes())
    data = [name for name in members if name.startswith("data.tar")]
    if len(data) != 1:
        raise ValueError(f"{paths[0]}: {len(data)} members data.tar.* instead of one")
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "data.tar"
        archive.write_bytes(members[data[0]])
        files = archives.read(archive, *(f"./usr/share/datasets/fashion-mnist/{stem}.gz" for stem in STEMS))
    return arrays([gzip.decompress(file) for file in files])


_SITE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_MD5 = ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310")
_OFFICIAL = tuple(Raw(f"fashion-mnist/{stem}.gz", f"md5:{md5}", Url(f"{_SITE}{stem}.gz"))
                  for stem, md5 in zip(STEMS, _MD5, strict=True))
_PACKAGE = Raw("dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
               "sha256:39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", Apt("dataset-fashion-mnist"))

DESCRIPTION = Description(
    name="fashion_mnist",
    classes=("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    sources=(Source("official", _OFFICIAL, read_official), Source("package", (_PACKAGE,), read_package)),
    shape=(28, 28, 1),
    sizes=(60_000, 10_000),
    mean=(0.2860,),
    std=(0.3530,),
    published="training-set statistics",
    measured=((0.2860,), (0.3530,), 1e-3),
    balanced=True,
    content="cab4d3c703051d2dbd5ddcf613178e17c72eacee89444b16a1ba4cba2b13676e",
    licence="MIT (Zalando SE); cite Xiao et al. 2017",
)
