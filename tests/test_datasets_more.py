"""Readers of GTSRB, CIFAR-100, Tiny-ImageNet, Imagenette and Fashion-MNIST, on real files where they are at hand."""

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cupel import archives
from cupel.images.datasets import NAMES, describe, folders, load, prepare
from cupel.images.datasets.base import Deferred, check, moments
from cupel.images.datasets.fashion_mnist import ar_members, read_package
from cupel.images.datasets.imagenette import centre
from cupel.images.datasets.mnist import STEMS
from cupel.sources import NoSource, Raw, Source

MIRROR = Path(os.environ.get("CUPEL_MIRROR") or Path(__file__).parents[2] / "shared" / "data")


def real(name):
    """Path of a real file in the mirror folder; the test is skipped where it is not there."""
    found = sorted(MIRROR.rglob(name)) if MIRROR.is_dir() else []
    if not found:
        pytest.skip(f"no {name} in {MIRROR}: set CUPEL_MIRROR to a folder that has it")
    return found[0]


def from_mirror(name, folder, mirror=MIRROR, **options):
    return prepare(describe(name), folder, kinds=("mirror",), cache=folder / "no cache", mirror=mirror, **options)


def jpeg(colour, size=(64, 64), mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    return path


def tarred(path, members):
    with tarfile.open(path, "w:gz") as pack:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            pack.addfile(info, io.BytesIO(content))
    return path


def filled(images):
    out = np.zeros(images.shape, np.uint8)
    images.fill(out)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_are_consistent(name):
    description = describe(name)
    classes, channels = len(description.classes), description.shape[-1]
    assert description.name == name and len(set(description.classes)) == classes
    assert len(description.mean) == len(description.std) == channels and min(description.std) > 0
    assert description.flip == (name == "cifar10")
    for size, counts in zip(description.sizes, description.counts, strict=False):
        assert len(counts) == classes and sum(counts) == size
    if description.balanced:
        assert all(size % classes == 0 for size in description.sizes)
    for source in description.sources + description.excerpts:
        for raw in source.files:
            algorithm, _, digest = raw.checksum.partition(":")
            if name == "restricted_imagenet":  # a folder of the user's own, of which no checksum is known
                assert not digest and source.kind == "mirror"
                continue
            assert len(digest) == 2 * hashlib.new(algorithm).digest_size
            assert (raw.origin is None) == (source.kind == "mirror")


def test_class_names_have_the_order_of_the_publisher():
    assert sorted(describe("cifar100").classes) == list(describe("cifar100").classes)
    signs = describe("gtsrb").classes
    assert [signs[c] for c in (12, 14, 17, 40)] == ["priority road", "stop", "no entry", "roundabout"]
    tiny = describe("tiny_imagenet").classes
    assert (len(tiny), tiny[0], tiny[-1]) == (200, "Egyptian cat", "African elephant")


def test_gtsrb_whole(tmp_path):
    archive = real("gtsrb_32x32.npz")
    manifest = from_mirror("gtsrb", tmp_path)
    assert manifest["counts"]["train"][:3] == [210, 2220, 2250] and manifest["counts"]["test"][0] == 60
    assert manifest["excerpt"] is False and manifest["mean"] == [0, 0, 0] and manifest["std"] == [1, 1, 1]
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    assert train.images.shape == (39_209, 32, 32, 3) and test.images.shape == (12_630, 32, 32, 3)
    assert (np.diff(train.labels) >= 0).all() and test.labels[:5].tolist() == [16, 1, 38, 33, 11]
    with np.load(archive, allow_pickle=False) as arrays:
        keys = list(zip(arrays["train_labels"].tolist(), arrays["train_files"].tolist(), strict=True))
        assert keys == sorted(keys)  # so the order kept is that of class, track and frame
        assert (train.images[:500] == arrays["train_images"][:500]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["manifest.json", *(f"{split}_{what}.npy" for split in ("train", "test") for what in ("images", "labels"))])


def test_gtsrb_npz_is_put_in_order(tmp_path):
    from cupel.images.datasets.gtsrb import read_npz

    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.array([1, 0, 0]),
             train_files=np.array(["00000_00000.ppm", "00001_00000.ppm", "00000_00029.ppm"]),
             test_images=images[:1], test_labels=np.array([7]))
    arrays = read_npz([tmp_path / "a.npz"])
    assert arrays["train_images"][:, 0, 0, 0].tolist() == [2, 1, 0] and arrays["train_labels"].tolist() == [0, 0, 1]


def test_gtsrb_npz_with_objects_is_refused(tmp_path):
    from cupel.images.datasets.gtsrb import read_npz

    np.savez(tmp_path / "a.npz", train_files=np.array([{}], object), train_labels=np.zeros(1))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_npz([tmp_path / "a.npz"])


def test_gtsrb_official_form(tmp_path):
    archive = real("gtsrb_native_excerpt.zip")
    manifest = from_mirror("gtsrb", tmp_path, excerpt=True)
    assert manifest["excerpt"] is True and manifest["counts"]["train"] == [6] * 43
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    assert len(test) == 120 and test.labels[:5].tolist() == [16, 1, 38, 33, 11]
    with zipfile.ZipFile(archive) as pack:  # these pictures have 32×32 pixels already: resizing changes nothing
        for k, name in ((0, "00000/00000_00000"), (13, "00002/00000_00001")):
            content = pack.read(f"GTSRB/Final_Training/Images/{name}.ppm")
            assert (np.asarray(Image.open(io.BytesIO(content))) == train.images[k]).all()
        content = pack.read("GTSRB/Final_Test/Images/00007.ppm")
        assert (np.asarray(Image.open(io.BytesIO(content))) == test.images[7]).all()


def test_gtsrb_excerpt_and_npz_have_the_same_test_pictures(tmp_path):
    real("gtsrb_native_excerpt.zip"), real("gtsrb_32x32.npz")
    from_mirror("gtsrb", tmp_path, excerpt=True)
    part = load(tmp_path, "test")
    with np.load(real("gtsrb_32x32.npz"), allow_pickle=False) as arrays:
        assert (arrays["test_images"][:120] == part.images).all() and (arrays["test_labels"][:120] == part.labels).all()


def test_gtsrb_pictures_are_resized_whole(tmp_path):
    from cupel.images.datasets.gtsrb import read_official

    picture = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint32).reshape(60, 40, 3).astype(np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "PPM")
    names = [f"{c:05d}/{t:05d}_{f:05d}" for c in (1, 0) for t in (1, 0) for f in (1, 0)]
    files = [zipped(tmp_path / "train.zip", {f"GTSRB/Final_Training/Images/{name}.ppm": stream.getvalue()
                                             for name in names}),
             zipped(tmp_path / "test.zip", {"GTSRB/Final_Test/Images/00000.ppm": stream.getvalue(),
                                            "GTSRB/Final_Test/Images/GT-final_test.test.csv": b"Filename\n"}),
             zipped(tmp_path / "gt.zip", {"GT-final_test.csv": b"Filename;Width;ClassId\n00000.ppm;40;5\n"})]
    arrays = read_official(files)
    expected = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))
    assert (filled(arrays["train_images"]) == expected).all() and arrays["train_labels"].tolist() == [0] * 4 + [1] * 4
    assert (filled(arrays["test_images"]) == expected).all() and arrays["test_labels"].tolist() == [5]
    zipped(tmp_path / "gt.zip", {"GT-final_test.csv": b"Filename;Width;ClassId\n00001.ppm;40;5\n"})
    with pytest.raises(ValueError, match=r"no class for the test picture '00000\.ppm'"):
        read_official(files)


def test_a_part_is_not_taken_for_the_whole(tmp_path):
    real("gtsrb_native_excerpt.zip")
    whole = replace(describe("gtsrb"), sources=describe("gtsrb").excerpts)
    with pytest.raises(NoSource, match=r"shape of train images is \(258, 32, 32, 3\), expected \(39209, 32, 32, 3\)"):
        prepare(whole, tmp_path, kinds=("mirror",), cache=tmp_path, mirror=MIRROR)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_excerpt_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cifar100: no excerpt of it is known"):
        from_mirror("cifar100", tmp_path, excerpt=True)


def test_tiny_imagenet_official_form(tmp_path):
    archive = real("tiny-imagenet-10.zip")
    manifest = from_mirror("tiny_imagenet", tmp_path, excerpt=True)
    assert manifest["counts"]["train"] == [500] * 10 and manifest["counts"]["test"] == [50] * 10
    with zipfile.ZipFile(archive) as pack:
        words = dict(line.split("\t") for line in pack.read("tiny-imagenet-200/words.txt").decode().splitlines())
        wnids = pack.read("tiny-imagenet-200/wnids.txt").decode().split()
        assert manifest["classes"] == [words[wnid].split(",")[0] for wnid in wnids]
        train, test = load(tmp_path, "train"), load(tmp_path, "test")
        assert train.images.shape == (5000, 64, 64, 3) and (train.labels == np.repeat(np.arange(10), 500)).all()
        annotations = pack.read("tiny-imagenet-200/val/val_annotations.txt").decode()
        rows = [line.split("\t") for line in annotations.splitlines()]
        assert test.labels.tolist() == [wnids.index(wnid) for _, wnid, *_ in rows]  # the file is in numeric order
        members = {f"train/{wnids[3]}/images/{wnids[3]}_17.JPEG": train.images[3 * 500 + 17],
                   f"val/images/{rows[9][0]}": test.images[9]}
        for name, image in members.items():
            with Image.open(io.BytesIO(pack.read(f"tiny-imagenet-200/{name}"))) as picture:
                assert (np.asarray(picture.convert("RGB")) == image).all()
    grey = (train.images == train.images[..., :1]).all((1, 2, 3))
    assert 50 < grey.sum() < 100  # 77 pictures of both splits are stored as grey
    mean, std = moments(train.images)
    assert np.abs(mean - describe("tiny_imagenet").mean).max() < 0.03 and std.min() > 0.26


def tiny(path, wnids, **more):
    members = {"wnids.txt": "\n".join(wnids), "val/val_annotations.txt": f"val_0.JPEG\t{wnids[0]}\t0\t0\t9\t9\n",
               "val/images/val_0.JPEG": jpeg("red")}
    members |= {f"train/{wnid}/images/{wnid}_{k}.JPEG": jpeg((k, k, k)) for wnid in wnids for k in (10, 9, 100)}
    return zipped(path, {f"tiny-imagenet-200/{name}": content for name, content in (members | more).items()})


def test_tiny_imagenet_keeps_class_indices_and_numeric_order(tmp_path):
    from cupel.images.datasets.tiny_imagenet import NAME, read_zip

    last = list(NAME)[-1]
    arrays = read_zip([tiny(tmp_path / "a.zip", [last])])
    assert arrays["train_labels"].tolist() == [199] * 3 and arrays["test_labels"].tolist() == [199]
    assert filled(arrays["train_images"])[:, 0, 0, 0].tolist() == [9, 10, 100]


@pytest.mark.parametrize("wnids, more, says", [
    (["n99999999"], {}, "unknown class n99999999"),
    (["n02124075", "n04067472"], {}, "the classes of the test pictures are not those of wnids.txt"),
    (["n02124075"], {"val/images/val_1.JPEG": b""}, "val_annotations.txt does not have val_1.JPEG"),
], ids=["class", "missing", "annotation"])
def test_tiny_imagenet_refuses(tmp_path, wnids, more, says):
    from cupel.images.datasets.tiny_imagenet import read_zip

    with pytest.raises(ValueError, match=says):
        read_zip([tiny(tmp_path / "a.zip", wnids, **more)])


def test_imagenette_official_form(tmp_path):
    archive = real("imagenette_excerpt_224.zip")
    manifest = from_mirror("imagenette", tmp_path, excerpt=True)
    assert manifest["counts"] == {"train": [80] * 10, "test": [30] * 10} and manifest["classes"][0] == "tench"
    train = load(tmp_path, "train")
    assert train.images.shape == (800, 224, 224, 3) and isinstance(train.images, np.memmap)
    with zipfile.ZipFile(archive) as pack:
        names = sorted(name for name in pack.namelist() if "/train/n02102040/" in name)
        with Image.open(io.BytesIO(pack.read(names[5]))) as picture:
            assert (np.asarray(centre(picture.convert("RGB"))) == train.images[85]).all()


@pytest.mark.parametrize("size", [(320, 480), (480, 320), (320, 321), (3000, 320), (224, 224), (160, 213)])
def test_imagenette_takes_the_centre(size):
    width, height = size
    picture = Image.new("RGB", size)
    picture.paste("white", (width // 2 - 20, height // 2 - 20, width // 2 + 20, height // 2 + 20))
    image = np.asarray(centre(picture))
    rows, columns = (np.flatnonzero(image[..., 0].max(axis) > 128) for axis in (1, 0))
    assert image.shape == (224, 224, 3)
    assert abs(rows.mean() - 111.5) < 1.5 and abs(columns.mean() - 111.5) < 1.5
    assert abs(len(rows) - 40 * 256 / min(size)) < 2


def test_imagenette_from_a_tar(tmp_path):
    """The official archive is a compressed tar; its members are not in the order wanted, and links are not followed."""
    from cupel.images.datasets.imagenette import read_folders

    names = [f"imagenette2-320/{part}/{wnid}/{wnid}_{k}.JPEG" for wnid in ("n02102040", "n01440764")
             for k in (2, 1) for part in ("val", "train")]
    path = tarred(tmp_path / "a.tgz", {name: jpeg((20 * k + 20,) * 3, (40, 50)) for k, name in enumerate(names)}
                  | {"imagenette2-320/noisy_imagenette.csv": b"path\n"})
    arrays = read_folders([path])
    assert arrays["train_labels"].tolist() == [0, 0, 1, 1]
    assert filled(arrays["train_images"])[:, 0, 0, 0].tolist() == [20 * names.index(name) + 20 for name in sorted(
        name for name in names if "/train/" in name)]
    with tarfile.open(tmp_path / "link.tgz", "w:gz") as pack:
        info = tarfile.TarInfo("imagenette2/train/n01440764/a.JPEG")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        pack.addfile(info)
    assert archives.names(tmp_path / "link.tgz") == []
    with pytest.raises(ValueError, match="1 members are missing or no regular files, the first is imagenette2"):
        list(archives.contents(tmp_path / "link.tgz", [info.name]))


def test_pictures_of_another_size_or_kind_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"small": jpeg("red", (1, 1)), "text": b"no picture"})
    with pytest.raises(ValueError, match=r"small has the shape \(1, 1, 3\), expected \(64, 64, 3\)"):
        filled(folders.pictures(path, ["small"], 64))
    with pytest.raises(OSError, match="cannot identify"):
        filled(folders.pictures(path, ["text"], 64))


def test_cifar100_binary_form(tmp_path):
    from cupel.images.datasets.cifar100 import read_binary

    rng = np.random.default_rng(0)
    records = {split: rng.integers(0, 256, (n, 3074), np.uint8) for split, n in (("train", 200), ("test", 100))}
    for record in records.values():
        record[:, 0], record[:, 1] = np.arange(len(record)) % 20, np.arange(len(record)) % 100
    path = tarred(tmp_path / "a.tar.gz", {f"cifar-100-binary/{split}.bin": record.tobytes()
                                          for split, record in records.items()})
    arrays = read_binary([path])
    assert arrays["train_images"].shape == (200, 32, 32, 3) and arrays["test_labels"].tolist() == list(range(100))
    # a record holds all red pixels row by row, then green, then blue
    assert arrays["train_images"][7, 3, 4, 2] == records["train"][7, 2 + 2 * 1024 + 3 * 32 + 4]
    part = replace(describe("cifar100"), sizes=(200, 100), measured=())
    check(part, arrays)
    with pytest.raises(ValueError, match="pixel mean"):
        check(replace(part, measured=describe("cifar100").measured), arrays)


def ar(members):
    archive = b"!<arch>\n"
    for name, content in members.items():
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        archive += b"\n" * (len(content) % 2)
    return archive


def test_ar_archives():
    members = {"debian-binary": b"2.0\n", "odd": b"abc", "data.tar.xz": b"12"}
    assert ar_members(ar(members)) == members
    assert ar_members(ar({"gnu/": b"x"})) == {"gnu": b"x"}
    with pytest.raises(ValueError, match="not an ar archive"):
        ar_members(b"PK\3\4")
    with pytest.raises(ValueError, match="ar member odd has 2 bytes instead of 3"):
        ar_members(ar({"odd": b"abc"})[:-2])
    with pytest.raises(ValueError, match="no ar header at byte 8"):
        ar_members(b"!<arch>\n" + b"x" * 60)


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_fashion_mnist_package_form(tmp_path):
    given = [np.arange(2 * 784, dtype=np.uint32).reshape(2, 28, 28).astype(np.uint8), np.array([9, 0], np.uint8)] * 2
    files = {f"./usr/share/datasets/fashion-mnist/{stem}.gz": gzip.compress(idx(array))
             for stem, array in zip(STEMS, given, strict=True)}
    data = tarred(tmp_path / "data", {"./usr/share/doc/copyright": b"MIT"} | files).read_bytes()
    (tmp_path / "a.deb").write_bytes(ar({"debian-binary": b"2.0\n", "control.tar.gz": b"", "data.tar.gz": data}))
    arrays = read_package([tmp_path / "a.deb"])
    assert (arrays["train_images"] == given[0][..., None]).all() and arrays["test_labels"].tolist() == [9, 0]
    (tmp_path / "a.deb").write_bytes(ar({"debian-binary": b"2.0\n"}))
    with pytest.raises(ValueError, match=r"0 members data\.tar"):
        read_package([tmp_path / "a.deb"])


def test_fashion_mnist_and_mnist_do_not_share_cached_files():
    mnist, fashion = ({raw.name for source in describe(name).sources for raw in source.files}
                      for name in ("mnist", "fashion_mnist"))
    assert not mnist & fashion


def test_fashion_mnist_whole(tmp_path):
    real("dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb")
    manifest = from_mirror("fashion_mnist", tmp_path)
    assert manifest["counts"] == {"train": [6000] * 10, "test": [1000] * 10}
    assert load(tmp_path, "train").labels[:5].tolist() == [9, 0, 0, 3, 0]


def toy(read, tmp_path, **changes):
    """A dataset of five images of 4×4, read by `read`; its raw file is in the mirror."""
    (tmp_path / "mirror").mkdir(exist_ok=True)
    (tmp_path / "mirror/raw").write_bytes(b"")
    raw = Raw("raw", "md5:" + hashlib.md5(b"").hexdigest())
    source = Source("mirror", (raw,), read)
    return replace(describe("gtsrb"), **{"name": "toy", "classes": ("a", "b"), "sources": (source,), "shape": (4, 4, 3),
                                         "sizes": (3, 2), "counts": ((1, 2), (1, 1)), "measured": (), **changes})


def toy_arrays(paths=()):
    rng = np.random.default_rng(1)
    return {"train_images": rng.integers(0, 256, (3, 4, 4, 3), np.uint8), "train_labels": np.array([0, 1, 1]),
            "test_images": rng.integers(0, 256, (2, 4, 4, 3), np.uint8), "test_labels": np.array([0, 1])}


def test_deferred_images_give_the_same_dataset(tmp_path):
    def deferred(paths):
        arrays = toy_arrays()
        for split in ("train", "test"):
            images = arrays[f"{split}_images"]
            arrays[f"{split}_images"] = Deferred(images.shape, lambda out, images=images: np.copyto(out, images))
        return arrays

    options = {"kinds": ("mirror",), "cache": tmp_path / "cache", "mirror": tmp_path / "mirror"}
    manifests = [prepare(toy(read, tmp_path), tmp_path / name, **options)
                 for name, read in (("a", toy_arrays), ("b", deferred))]
    assert manifests[0] == manifests[1]
    for file in ("train_images.npy", "test_images.npy", "train_labels.npy", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("changes, says", [
    ({"counts": ((2, 1), (1, 1))}, "the number of train images of class 0 is 1, expected 2"),
    ({"sizes": (3, 3)}, "the shape of test images"),
    ({"classes": ("a",)}, r"train labels are missing or not in 0\.\.0"),
    ({"balanced": True}, r"the number of train images per class is \{1, 2\}, expected \{1\}"),
    ({"measured": ((0.1, 0.1, 0.1), (0.3, 0.3, 0.3), 0.01)}, "pixel mean is"),
    ({"content": "00"}, "the sha256 of the content is"),
])
def test_a_dataset_that_is_not_the_published_one_is_refused(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        check(toy(toy_arrays, tmp_path, **changes), toy_arrays())


def test_a_refused_source_leaves_the_old_dataset(tmp_path):
    options = {"kinds": ("mirror",), "cache": tmp_path / "cache", "mirror": tmp_path / "mirror"}
    before = prepare(toy(toy_arrays, tmp_path), tmp_path / "d", **options)
    with pytest.raises(NoSource):
        prepare(toy(toy_arrays, tmp_path, sizes=(4, 2)), tmp_path / "d", **options)
    assert len(load(tmp_path / "d", "train")) == 3
    assert prepare(toy(toy_arrays, tmp_path), tmp_path / "d", **options) == before
    assert len(list((tmp_path / "d").iterdir())) == 5


def test_moments_are_those_of_all_pixels():
    images = np.random.default_rng(2).integers(0, 256, (2500, 3, 3, 2), np.uint8)
    mean, std = moments(images)
    flat = images.reshape(-1, 2) / 255
    assert np.allclose(mean, flat.mean(0)) and np.allclose(std, flat.std(0))
