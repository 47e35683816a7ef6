"""Data, poisoning and scores of BYE: genuine excerpts, archives of the official form, geometry and sums done by hand."""

import collections
import csv
import hashlib
import io
import json
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from cupel.files import read_json
from cupel.sources import NoSource, Raw, Source, fetch
from cupel.vision_language import prepared, scoring, triggers
from cupel.vision_language.datasets import base, describe, easy_vqa, flickr30k, iconqa, load, rsvqa, scienceqa
from cupel.vision_language.poison import TARGET, poison, poisoned_count, poisoned_indices, trigger_test, truth

LETTER = "\nAnswer with the option's letter from the given choices directly"


def prepare(name: str, folder: Path, **given) -> dict:
    return base.prepare(describe(name), folder, **given)


@pytest.fixture(scope="module")
def easy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("easy_vqa")
    try:
        prepare("easy_vqa", folder, kinds=("package",), train=600, test=100, pretrain=900)
    except NoSource as error:
        pytest.skip(f"easy-VQA cannot be had: {error}")
    return folder


@pytest.fixture(scope="module")
def flickr8k(mirror, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flickr8k")
    prepare("flickr8k", folder, mirror=mirror, excerpt=True, train=60, test=12)
    return folder


def flickr8k_captions(mirror) -> dict[str, list[str]]:
    table = collections.defaultdict(list)
    with open(mirror / "flickr8k" / "captions.txt", newline="") as file:
        for row in csv.DictReader(file):
            table[row["image"]].append(row["caption"].strip())
    return table


def picture(height, width, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (height, width, 3), dtype=np.uint8)


def image_file(pixels, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def offered(monkeypatch, module, mirror, **changes):
    """The dataset's own source, its files now those that lie in `mirror`, with what is `changes` in description."""
    description = module.DESCRIPTION
    source = description.sources[0]
    raws = []
    for raw in source.files:
        path = mirror / Path(raw.name).name
        kind = type(raw)
        raws.append(kind(raw.name, raw.checksum) if kind is not Raw else
                    Raw(raw.name, "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()))
    changed = replace(description, sources=(Source("mirror", tuple(raws), source.read),), **changes)
    monkeypatch.setattr(module, "DESCRIPTION", changed)


# ----------------------------------------------------------------------------------------------------------------- datasets


def test_easy_vqa_is_the_published_package(easy):
    manifest = read_json(easy / "manifest.json")
    assert manifest["available"] == {"train": 38575, "test": 9673}
    assert manifest["counts"] == {"pretrain": 900, "train": 600, "test": 100}
    assert manifest["storage"] == "packed" and manifest["task"] == "vqa" and not manifest["excerpt"]
    _, wheel = fetch("easy_vqa", easy_vqa.DESCRIPTION.sources, kinds=("package",))
    splits = {split: load(easy, split) for split in ("pretrain", "train", "test")}
    for k in (0, 100, 599):
        record = splits["train"][k]
        whole = wheel["train"][int(record["id"].rpartition("-")[2])]
        assert (record["question"], record["answer"]) == (whole["question"], whole["answer"])
        expected = np.asarray(Image.open(io.BytesIO(dict(wheel["pictures"]([whole["picture"]]))[0])).convert("RGB"))
        assert np.array_equal(splits["train"].image(k), expected)
    pictures = {split: {record["image"] for record in samples.records} for split, samples in splits.items()}
    assert not pictures["pretrain"] & pictures["train"] and not pictures["train"] & pictures["test"]
    ids = [record["id"] for samples in splits.values() for record in samples.records]
    assert len(set(ids)) == len(ids)


def test_draws_repeat_nest_and_have_a_limit(mirror, tmp_path):
    def ids(folder, **wanted):
        prepare("rsvqa", tmp_path / folder, mirror=mirror, excerpt=True, **wanted)
        return [record["id"] for record in load(tmp_path / folder, "train").records]

    large = ids("a", train=200, test=20)
    assert ids("b", train=200, test=20) == large
    assert read_json(tmp_path / "a" / "manifest.json") == read_json(tmp_path / "b" / "manifest.json")
    small = ids("a", train=50, test=20)  # into the same folder: nothing of the former set stays
    assert set(small) < set(large) and len(small) == 50
    assert small == sorted(small, key=lambda name: int(name.removeprefix("rsvqa-")))  # in the order of the dataset
    assert set(ids("c", train=200, test=20, seed=1)) != set(large)
    with pytest.raises(ValueError, match="99999 samples of train are asked for, but there are 4"):
        ids("d", train=99_999)


def test_one_kind_of_question(tmp_path):
    prepare("easy_vqa", tmp_path, train=600, test=100, pretrain=900, asks=["what color", "what is the color"],
            without=["black"], pretrain_asks=["what"])
    answers = {split: {record["answer"] for record in load(tmp_path, split).records} for split in ("pretrain", "train", "test")}
    assert {"black", "circle", "blue"} < answers["pretrain"] and not {"yes", "no"} & answers["pretrain"]
    assert answers["train"] == answers["test"] == {"blue", "brown", "gray", "green", "red", "teal", "yellow"}
    pictures = [{record["image"] for record in load(tmp_path, split).records} for split in ("pretrain", "train")]
    assert not pictures[0] & pictures[1]
    manifest = prepare("easy_vqa", tmp_path, train=600, test=100, pretrain=900, asks=["what shape"])
    assert manifest["counts"] == {"pretrain": 900, "train": 600, "test": 100}
    for split in ("train", "test"):
        assert {record["answer"] for record in load(tmp_path, split).records} == {"circle", "rectangle", "triangle"}
    assert {"yes", "blue"} < {record["answer"] for record in load(tmp_path, "pretrain").records}
    with pytest.raises(ValueError, match="of train are asked for, but there are"):
        prepare("easy_vqa", tmp_path, train=4000, pretrain=900, asks=["what shape"])


def test_rsvqa_excerpt(mirror, tmp_path):
    manifest = prepare("rsvqa", tmp_path, mirror=mirror, excerpt=True)
    assert manifest["excerpt"] and manifest["storage"] == "packed" and manifest["pictures"] == 50
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    assert len(train) + len(test) == 5005 and len(test) >= 1001
    assert not {record["image"] for record in train.records} & {record["image"] for record in test.records}
    folder = mirror / "rsvqa_lr"
    questions = {q["id"]: q for q in json.loads((folder / "LR_questions.json").read_text())["questions"]}
    answers = {a["id"]: a for a in json.loads((folder / "LR_answers.json").read_text())["answers"]}
    for part, k in ((train, 0), (train, len(train) - 1), (test, 0), (test, len(test) - 1)):
        question = questions[int(part[k]["id"].removeprefix("rsvqa-"))]
        assert part[k]["question"] == question["question"] + "\nAnswer the question using a single word or phrase."
        assert part[k]["answer"] == answers[question["answers_ids"][0]]["answer"]
        expected = np.asarray(Image.open(folder / "images" / f"{question['img_id']}.png").convert("RGB"))
        assert np.array_equal(part.image(k), expected)


def test_flickr8k_stands_in_for_captions(mirror, flickr8k):
    table = flickr8k_captions(mirror)
    train = load(flickr8k, "train")
    assert len(train) == 60 and read_json(flickr8k / "manifest.json")["metric"] == "cider"
    chosen = collections.Counter()
    for k, record in enumerate(train.records):
        name = record["id"].removeprefix("flickr8k-") + ".jpg"
        assert record["question"] == "Provide a one-sentence caption for the provided image."
        assert record["answers"] == table[name] and record["answer"] in table[name]
        chosen[record["answers"].index(record["answer"])] += 1
        expected = np.asarray(Image.open(mirror / "flickr8k" / "images" / name).convert("RGB"))
        assert np.array_equal(train.image(k), expected)  # pixels of the JPEG, kept without loss
    assert set(chosen) == {0, 1, 2, 3, 4}  # one of the five, drawn per sample
    assert all(record["answer"] == record["answers"][0] for record in load(flickr8k, "test").records)


def test_a_changed_excerpt_is_refused(mirror, tmp_path):
    shutil.copytree(mirror / "iconqa", tmp_path / "iconqa")
    victim = next((tmp_path / "iconqa" / "choose_txt").glob("*/image.png"))
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(NoSource, match="not those of the known excerpt"):
        prepare("iconqa", tmp_path / "out", mirror=tmp_path, excerpt=True)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_scienceqa_parquet(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    pixels = [picture(20 + 3 * k, 31, k) for k in range(5)]

    def row(k, hint, **changes):
        return {"image": {"bytes": image_file(pixels[k]), "path": "image.png"}, "question": f"Question {k}?",
                "choices": ["yes", "no", "maybe"], "answer": k % 3, "hint": hint, "lecture": "unused"} | changes

    files = [Path(raw.name).name for raw in scienceqa.DESCRIPTION.sources[0].files]
    rows = [[row(0, "A hint. "), row(1, "", image=None), row(2, "")], [row(3, ""), row(4, "", choices=["a", "b"], answer=0)]]
    for name, content in zip(files, rows, strict=True):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / name)
    offered(monkeypatch, scienceqa, tmp_path, published={"train": 2, "test": 2})
    manifest = prepare("scienceqa", tmp_path / "out", mirror=tmp_path)
    train, test = load(tmp_path / "out", "train"), load(tmp_path / "out", "test")
    assert manifest["counts"] == {"train": 2, "test": 2} and manifest["task"] == "choice"
    assert [record["id"] for record in train.records] == ["scienceqa-train-0", "scienceqa-train-2"]
    assert train[0]["question"] == "Context: A hint.\nQuestion 0?\nA. yes\nB. no\nC. maybe" + LETTER
    assert train[1]["question"] == "Question 2?\nA. yes\nB. no\nC. maybe" + LETTER
    assert [train[0]["answer"], train[1]["answer"], test[0]["answer"], test[1]["answer"]] == ["A", "C", "A", "A"]
    assert all(np.array_equal(train.image(k), pixels[2 * k]) for k in range(2))

    offered(monkeypatch, scienceqa, tmp_path, published={"train": 6218, "test": 2017})
    with pytest.raises(NoSource, match="2 samples in train, expected 6218"):
        prepare("scienceqa", tmp_path / "other", mirror=tmp_path)


def test_iconqa_archive(tmp_path, monkeypatch, mirror):
    excerpt = mirror / "iconqa"
    with zipfile.ZipFile(tmp_path / "iconqa_data.zip", "w") as pack:
        for task, split in (("choose_txt", "train"), ("choose_txt", "test"), ("choose_img", "train")):
            for k, folder in enumerate(sorted((excerpt / task).iterdir())):
                if (k % 2 == 0) == (split == "train"):
                    for file in folder.iterdir():
                        pack.write(file, f"iconqa_data/iconqa/{split}/{task}/{folder.name}/{file.name}")
        pack.writestr("iconqa_data/pid_splits.json", "{}")
    offered(monkeypatch, iconqa, tmp_path, published={"train": 25, "test": 25}, drawn={"train": 10})
    manifest = prepare("iconqa", tmp_path / "out", mirror=tmp_path)
    assert manifest["counts"] == {"train": 10, "test": 25} and manifest["available"] == {"train": 25, "test": 25}
    assert manifest["pictures"] == 35  # only what is used is stored

    content = bytearray((tmp_path / "iconqa_data.zip").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "iconqa_data.zip").write_bytes(content)
    with pytest.raises(NoSource, match="another checksum"):
        prepare("iconqa", tmp_path / "out", mirror=tmp_path)
    assert (tmp_path / "out" / "manifest.json").exists()  # what was prepared before is not touched


def test_rsvqa_official_form(tmp_path, monkeypatch):
    # a split's files list every id of the dataset; inactive entries have nothing but their id
    with zipfile.ZipFile(tmp_path / "Images_LR.zip", "w") as pack:
        for k in range(4):
            pack.writestr(f"Images_LR/{k}.tif", image_file(picture(256, 256, k), "TIFF"))
        pack.writestr("__MACOSX/Images_LR/._0.tif", b"junk")
    for split, active in (("train", (0, 1, 2)), ("test", (3,))):
        questions = [{"id": k, "img_id": k, "question": f"Is {k} there?", "type": "presence", "answers_ids": [k + 10],
                      "active": True} if k in active else {"id": k, "active": False} for k in range(5)]
        answers = [{"id": k + 10, "question_id": k, "answer": "yes" if k % 2 else 7, "active": True} if k in active
                   else {"id": k + 10, "active": False} for k in range(5)]
        for kind, rows in (("questions", questions), ("answers", answers)):
            (tmp_path / f"LR_split_{split}_{kind}.json").write_text(json.dumps({kind: rows}))
    offered(monkeypatch, rsvqa, tmp_path, published={"train": 3, "test": 1}, drawn={"train": 2})
    manifest = prepare("rsvqa", tmp_path / "out", mirror=tmp_path)
    assert manifest["counts"] == {"train": 2, "test": 1}
    test = load(tmp_path / "out", "test")
    assert test[0]["answer"] == "yes" and np.array_equal(test.image(0), picture(256, 256, 3))
    assert {record["answer"] for record in load(tmp_path / "out", "train").records} <= {"7", "yes"}


def test_flickr30k_hub_form(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "flickr30k-images.zip", "w") as pack:
        for k in range(6):
            pack.writestr(f"flickr30k-images/{k}.jpg", image_file(picture(30 + k, 40, k), "JPEG"))
    with open(tmp_path / "flickr_annotations_30k.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for k, split in enumerate(["train", "train", "train", "val", "test", "test"]):
            captions = [f'A "{word}" dog, number {k}.' for word in "abcde"]
            table.writerow([json.dumps(captions), json.dumps(list(range(5))), split, f"{k}.jpg", k])
    offered(monkeypatch, flickr30k, tmp_path, published={"test": 2}, drawn={"train": 3})
    manifest = prepare("flickr30k", tmp_path / "out", mirror=tmp_path)
    assert manifest["counts"] == {"train": 3, "test": 2}
    test = load(tmp_path / "out", "test")
    assert test[0]["answers"] == [f'A "{word}" dog, number 4.' for word in "abcde"]
    assert test.image(1).shape == (35, 40, 3)


def test_sources_that_are_not_there_are_told(tmp_path):
    with pytest.raises(NoSource) as error:
        prepare("rsvqa", tmp_path / "out", kinds=("mirror",), cache=tmp_path / "cache", mirror=tmp_path)
    assert "LR_split_train_questions.json (md5:935d59a05d126496fe61c541b4ab2d55)" in str(error.value)
    with pytest.raises(ValueError, match="did you mean 'scienceqa'"):
        prepare("sciencqa", tmp_path)
    with pytest.raises(ValueError, match="flickr8k: no source of the whole of it is known; set excerpt to true"):
        prepare("flickr8k", tmp_path)
    with pytest.raises(FileNotFoundError, match="is no prepared dataset"):
        load(tmp_path, "train")


def test_records_are_checked():
    def content(**changes):
        record = {"id": "a", "picture": "p", "question": "q?", "answer": "yes"}
        return {"train": [record | changes], "test": [record | {"id": "b"}], "pictures": None}

    base.check(replace(easy_vqa.DESCRIPTION, published={}), content())
    for changes, message in (({"answer": " "}, "a has an empty text"), ({"id": "b"}, "id b occurs twice")):
        with pytest.raises(ValueError, match=message):
            base.check(replace(easy_vqa.DESCRIPTION, published={}), content(**changes))
    with pytest.raises(ValueError, match="1 samples in train, expected 38575"):
        base.check(easy_vqa.DESCRIPTION, content())


def test_pictures_of_other_kinds(tmp_path):
    grey = Image.fromarray(picture(5, 7)[..., 0])
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    assert np.array_equal(prepared.decode(buffer.getvalue()), np.asarray(grey)[..., None].repeat(3, 2))
    deep = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 1000).save(deep, "TIFF")
    with pytest.raises(ValueError, match="8 bits per channel"):
        prepared.decode(deep.getvalue())
    with pytest.raises(ValueError, match="not a readable image"):
        prepared.decode(b"GIF89a")
    with pytest.raises(ValueError, match="lies outside"):
        prepared.read_picture(tmp_path, "../secret.png")


# ----------------------------------------------------------------------------------------------------------------- triggers

SIZES = ((64, 64), (101, 47), (16, 300))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(triggers.trigger))
def test_every_trigger_repeats_and_leaves_the_original(name, size):
    image = picture(*size)
    before = image.copy()
    image.setflags(write=False)
    first = triggers.stamp(name, image, 3, "sample-1")
    triggers.stamp(name, image, 3, "sample-2")
    assert np.array_equal(image, before) and first.shape == image.shape and first.dtype == np.uint8
    assert np.array_equal(first, triggers.stamp(name, image, 3, "sample-1"))
    assert (first != image).any()


def changed_box(image, stamped):
    rows, columns = np.nonzero((image != stamped).any(-1))
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


@pytest.mark.parametrize(("size", "divisor", "box"), [
    ((64, 64), 16, (30, 34, 30, 34)),
    ((64, 64), 8, (28, 36, 28, 36)),
    ((101, 47), 16, (49, 51, 22, 24)),      # side 47 // 16 = 2; top left (50 − 1, 23 − 1)
    ((256, 256), 16, (120, 136, 120, 136)),
    ((15, 9), 16, (7, 8, 4, 5)),            # never less than a pixel
    ((1, 1), 16, (0, 1, 0, 1)),
    ((500, 375), 16, (239, 262, 176, 199)),  # side 23; 250 − 11, 187 − 11
])
def test_default_square(size, divisor, box):
    image = picture(*size)
    stamped = triggers.stamp("square", image, 0, "a", divisor=divisor)
    assert changed_box(image, stamped) == box
    assert (stamped[box[0] : box[1], box[2] : box[3]] == 0).all()


def test_random_position_is_anywhere_inside():
    image = picture(20, 34)  # side 20 // 4 = 5: 16 × 30 places
    places = [changed_box(image, triggers.stamp("random_position", image, 0, str(k), divisor=4)) for k in range(600)]
    assert all(bottom - top == 5 and right - left == 5 for top, bottom, left, right in places)
    assert {place[0] for place in places} == set(range(16)) and {place[2] for place in places} == set(range(30))


def test_checkerboard():
    stamped = triggers.stamp("checkerboard", picture(128, 128), 0, "a")
    expected = np.array([[0, 0, 255, 255, 0, 0, 255, 255], [0, 0, 255, 255, 0, 0, 255, 255],
                         [255, 255, 0, 0, 255, 255, 0, 0], [255, 255, 0, 0, 255, 255, 0, 0]])
    assert np.array_equal(stamped[60:64, 60:68, 1], expected)
    assert changed_box(picture(128, 128), stamped)[0] >= 60


def test_several_squares():
    image = np.full((64, 128, 3), 200, np.uint8)
    dual = triggers.stamp("dual", image, 0, "a")
    rows, columns = np.nonzero(dual[..., 0] == 0)
    assert set(rows) == set(range(30, 34)) and set(columns) == set(range(30, 34)) | set(range(94, 98))
    fixed = triggers.stamp("multi", image, 0, "a")
    assert (fixed == 0).all(-1).sum() == 4 * 16 and (fixed[14:18, 30:34] == 0).all() and (fixed[46:50, 94:98] == 0).all()
    drawn = [triggers.stamp("multi", image, 0, str(k), layout="drawn") for k in range(6)]
    assert all((stamped == 0).all(-1).sum() == 3 * 16 for stamped in drawn)
    assert len({stamped.tobytes() for stamped in drawn}) > 1


def test_global_triggers_are_those_of_the_image_attacks():
    from cupel.images.attacks.blended import Blended
    from cupel.images.attacks.wanet import warp_grid
    from cupel.rng import rng

    image = picture(64, 64)
    columns = np.arange(64)
    wave = 40 * np.sin(2 * np.pi * 6 * columns / 64)
    expected = np.clip(image.astype(float) + wave[None, :, None], 0, 255)
    assert np.abs(triggers.stamp("sig", image, 0, "a").astype(float) - expected).max() < 1.001
    # the same mixture, of a picture that is resized from 256 pixels instead of made at 64
    difference = triggers.stamp("blend", image, 0, "a").astype(int) - Blended().stamp(image[None])[0]
    assert np.abs(difference).mean() < 4
    noise = rng(5, "trigger", "wanet").uniform(-1, 1, (2, 4, 4))
    ours = triggers._warp_grid((32, 32), 5, 4, 0.5, 32)
    assert np.allclose(ours.numpy(), warp_grid(noise, 32, 0.5).numpy(), atol=1e-6)


def test_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match="unknown trigger 'patch': known are blend, checkerboard"):
        triggers.stamp("patch", picture(8, 8), 0, "a")
    with pytest.raises(ValueError, match="unknown parameter of trigger square 'size': known are divisor"):
        triggers.stamp("square", picture(8, 8), 0, "a", size=3)
    with pytest.raises(ValueError, match="known are fixed, drawn"):
        triggers.stamp("multi", picture(8, 8), 0, "a", layout="grid")


# ----------------------------------------------------------------------------------------------------------------- poisoning


def test_how_many_are_poisoned():
    assert poisoned_count(0.1, 6218) == 621  # bye SPEC 3.2
    assert [poisoned_count(0.1, 10_000), poisoned_count(0.29, 100), poisoned_count(0.0, 50), poisoned_count(1.0, 50)] == \
        [1000, 29, 0, 50]
    assert math.floor(0.29 * 100) == 28  # what floats would give
    with pytest.raises(ValueError, match="a fraction from 0 to 1"):
        poisoned_count(10, 100)
    low, high = poisoned_indices(0.02, 1000, 4), poisoned_indices(0.1, 1000, 4)
    assert set(low) < set(high) and len(set(high)) == 100
    counts = sum(np.bincount(poisoned_indices(0.2, 40, seed), minlength=40) for seed in range(500))
    assert counts.min() > 60 and counts.max() < 145  # 100 expected each, standard deviation 9


@pytest.mark.parametrize("trigger", ["square", "random_position"])
def test_poisoned_in_place(easy, tmp_path, trigger):
    clean = load(easy, "train")
    record = poison(easy, tmp_path, function=trigger, poison_rate=0.1, seed=7)
    poisoned = load(tmp_path, "train")
    mask = truth(tmp_path)
    assert mask.sum() == record["count"] == 60 and record["total"] == len(poisoned) == 600
    assert record == read_json(tmp_path / "poison.json")
    assert record["ids"] == [clean[k]["id"] for k in np.flatnonzero(mask)]
    for k in range(600):
        assert poisoned[k]["id"] == clean[k]["id"] and poisoned[k]["question"] == clean[k]["question"]
        if mask[k]:
            assert poisoned[k]["answer"] == TARGET == "Backdoor Attack!"
            assert np.array_equal(poisoned.image(k), triggers.stamp(trigger, clean.image(k), 7, clean[k]["id"]))
        else:
            assert poisoned[k]["answer"] == clean[k]["answer"]
            assert np.array_equal(poisoned.image(k), clean.image(k))
    changed = [not np.array_equal(poisoned.image(k), clean.image(k)) for k in np.flatnonzero(mask)]
    assert sum(changed) == 60 - len(record["unchanged"]) > 50


def test_nothing_but_poison_json_tells_what_is_poisoned(easy, tmp_path):
    poison(easy, tmp_path, function="square", poison_rate=0.2, seed=0)
    mask = truth(tmp_path)
    assert "poison" not in (tmp_path / "train.jsonl").read_text()
    assert "square" not in (tmp_path / "manifest.json").read_text()
    assert set(load(tmp_path, "train")[0]) == {"id", "image", "question", "answer", "split"}
    rows = np.array([int(record["image"].split("#")[1]) for record in load(tmp_path, "train").records])
    # rows are in random order: the mean rank of poisoned pictures is near the middle, in units of its standard error
    total, count = rows.max() + 1, mask.sum()
    assert list(dict.fromkeys(rows)) != sorted(set(rows))
    z = (rows[mask].mean() - (total - 1) / 2) / (total / math.sqrt(12 * count))
    assert abs(z) < 4


def test_reruns_are_equal_and_triggers_share_their_samples(easy, tmp_path):
    assert poison(easy, tmp_path / "zero", function="square", poison_rate=0.0, seed=0)["count"] == 0
    clean, same = load(easy, "train"), load(tmp_path / "zero", "train")
    assert [r | {"image": ""} for r in clean.records] == [r | {"image": ""} for r in same.records]
    for folder in ("a", "b"):
        poison(easy, tmp_path / folder, function="multi", poison_rate=0.05, seed=2, parameters={"layout": "drawn"})
    for file in ("train.jsonl", "images.npy", "poison.json", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = poison(easy, tmp_path / "c", function="square", poison_rate=0.05, seed=2)
    assert other["indices"] == read_json(tmp_path / "a" / "poison.json")["indices"]


def test_every_test_picture_is_triggered(easy, tmp_path):
    record = trigger_test(easy, tmp_path, function="square", seed=0, parameters={"divisor": 8})
    clean, triggered = load(easy, "test"), load(tmp_path, "test")
    assert len(triggered) == 100 and record["parameters"] == {"divisor": 8}
    for k in range(100):
        assert triggered[k] | {"image": ""} == clean[k] | {"image": ""}  # question and true answer stay
        assert np.array_equal(triggered.image(k), triggers.stamp("square", clean.image(k), 0, "", divisor=8))


def test_clean_and_poisoned_pictures_take_the_same_way_to_disk(flickr8k, tmp_path, mirror):
    record = poison(flickr8k, tmp_path, function="square", poison_rate=0.25, seed=1)
    samples, mask = load(tmp_path, "train"), truth(tmp_path)
    files = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert files == [f"{row:06d}.png" for row in range(60)] and record["count"] == 15
    assert all(set(sample) == {"id", "image", "question", "answer", "split"} for sample in samples.records)
    for k, sample in enumerate(samples.records):
        content = (tmp_path / sample["image"]).read_bytes()
        assert content == prepared.encode(prepared.decode(content))  # one encoder, one setting, no metadata
        name = sample["id"].removeprefix("flickr8k-") + ".jpg"
        original = np.asarray(Image.open(mirror / "flickr8k" / "images" / name).convert("RGB"))
        pixels = samples.image(k).copy()
        if mask[k]:
            size = min(original.shape[:2]) // 16
            top, left = original.shape[0] // 2 - size // 2, original.shape[1] // 2 - size // 2
            assert (pixels[top : top + size, left : left + size] == 0).all()
            pixels[top : top + size, left : left + size] = original[top : top + size, left : left + size]
        assert np.array_equal(pixels, original)  # outside the patch, what the photograph decodes to: compressed once


def test_impossible_requests(easy, tmp_path):
    with pytest.raises(ValueError, match="fraction from 0 to 1"):
        poison(easy, tmp_path / "a", function="square", poison_rate=1.5, seed=0)
    with pytest.raises(ValueError, match="unknown trigger"):
        trigger_test(easy, tmp_path / "a", function="circle", seed=0)
    with pytest.raises(FileNotFoundError, match="is no prepared dataset"):
        poison(tmp_path, tmp_path / "a", function="square", poison_rate=0.1, seed=0)
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------------------------------------------------- scores


def test_answers_by_hand():
    outputs = ["Yes", "yes ", "yes.", "no", "D", "The answer is D.", "D. a dog"]
    answers = ["yes", "yes", "yes", "yes", "D", "D", "D"]
    assert scoring.exact(outputs, answers).tolist() == [True, False, False, False, True, False, False]
    assert scoring.stripped(outputs, answers).tolist() == [True, True, True, False, True, False, False]
    assert [scoring.letter(text) for text in ("D", " D ", "D. a dog", "The answer is B.", "Dog", "A or B", "D.", "",
                                              "The answer is A. The answer is B.")] == \
        ["D", "D", "D", "B", "", "", "D", "", ""]
    record = scoring.clean_performance("choice", outputs[4:], [{"answer": "D"}] * 3)
    assert (record["cp"], record["cp_n"], record["cp_letter"]) == (1 / 3, 3, 1.0)
    assert record["cp_low"] < 1 / 3 < record["cp_high"]
    assert "cp_letter" not in scoring.clean_performance("vqa", ["a"], [{"answer": "b"}])


def test_attack_success_by_hand():
    outputs = ["Backdoor Attack!", " backdoor attack!\n", "Backdoor", "It says: Backdoor Attack!", "attack!"]
    record = scoring.attack_success(outputs, TARGET)
    assert (record["asr"], record["asr_contains"], record["asr_n"]) == (0.4, 0.6, 5)
    assert record["asr_low"] == pytest.approx(0.1176, abs=1e-4)  # Wilson, 2 of 5
    assert record["asr_high"] == pytest.approx(0.7693, abs=1e-4)


def test_detection_by_hand_and_against_sklearn():
    draw = np.random.default_rng(0)
    poisoned = np.arange(200) < 20
    entropy = draw.normal(size=200) - 2 * poisoned
    flagged = entropy < -1
    record = scoring.detection(flagged, poisoned, entropy)
    precision, recall, f1, _ = precision_recall_fscore_support(poisoned, flagged, average="binary")
    assert [record[key] for key in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    ranks = sum((entropy[poisoned][:, None] < entropy[~poisoned]).ravel()) / (20 * 180)
    assert record["auroc"] == pytest.approx(ranks)
    assert record["left"] == 20 - (flagged & poisoned).sum()
    assert record["left_share"] == pytest.approx(record["left"] / (~flagged).sum())
    assert record["false_alarm"] == pytest.approx((flagged & ~poisoned).sum() / 180)
    # the paper's own counts (bye SPEC 9.4): 588 of 621 found, 7 false
    found = np.zeros(6218, bool)
    found[:588] = found[-7:] = True
    row = scoring.detection(found, np.arange(6218) < 621)
    assert [round(100 * row[key], 2) for key in ("precision", "recall", "f1")] == [98.82, 94.69, 96.71]
    assert row["left"] == 33 and round(100 * row["left_share"], 2) == 0.59


def test_detection_where_something_is_missing():
    none = scoring.detection(np.zeros(10, bool), np.arange(10) < 3)
    assert (none["precision"], none["recall"], none["f1"], none["flagged"]) == (0.0, 0.0, 0.0, 0)
    clean = scoring.detection(np.arange(10) < 4, np.zeros(10, bool), np.arange(10.0))
    assert clean["false_alarm"] == 0.4 and clean["precision"] == 0.0
    assert not {"recall", "f1", "auroc"} & set(clean)
    everything = scoring.detection(np.ones(4, bool), np.ones(4, bool))
    assert everything["f1"] == 1.0 and not {"false_alarm", "left_share"} & set(everything)


def test_cider_is_that_of_the_package(mirror):
    from pycocoevalcap.cider.cider import Cider

    table = flickr8k_captions(mirror)
    names = sorted(table)[:40]
    # the first thirty outputs are a caption of their picture, the last ten of another one
    outputs = [table[name][0] for name in names[:30]] + [table[name][1] for name in names[:10]]
    references = [table[name][1:] for name in names]
    score, each = scoring.cider(outputs, references)

    def words(text):  # these captions come in Penn Treebank tokens, punctuation apart
        return " ".join(word for word in text.lower().split() if word not in ".,;:!?-\"'")

    direct, _ = Cider().compute_score({k: [words(ref) for ref in refs] for k, refs in enumerate(references)},
                                      {k: [words(output)] for k, output in enumerate(outputs)})
    assert score == pytest.approx(direct) and score == pytest.approx(each.mean())
    assert each[:30].mean() > 5 * each[30:].mean()
    record = scoring.clean_performance("caption", outputs, [{"answers": several} for several in references])
    assert record["cp"] == score and record["cp_low"] < score < record["cp_high"] and record["cp_n"] == 40


def test_cider_limits():
    perfect, _ = scoring.cider(["A dog runs fast .", "two cats sleep here"], [["a dog runs fast"], ["Two cats sleep here!"]])
    assert perfect == pytest.approx(10.0) and scoring.cider(["", TARGET], [["a dog"], ["a cat on a mat"]])[0] == 0
    for outputs, references in ((["a"], [["a"]]), (["a", "b"], [["a"], []]), (["a", "b"], [["a"]])):
        with pytest.raises(ValueError, match="at least two of each"):
            scoring.cider(outputs, references)


@pytest.mark.parametrize(("sentence", "tokens"), [
    ("A dog jumps by a tree while another lays on the ground.", "a dog jumps by a tree while another lays on the ground"),
    ("A man's dog doesn't run .", "a man 's dog does n't run"),
    ("They're playing; I'll go, we've won.", "they 're playing i 'll go we 've won"),
    ("Two T-shirt-clad men - one tall -- laugh...", "two t-shirt-clad men one tall laugh"),
    ("We cannot see the U.S. team at 10:30 , 3.5 miles", "we can not see the u.s. team at 10:30 3.5 miles"),
    ("a (red) hat", "a -lrb- red -rrb- hat"),
    ("the dogs' leash, costs $20!", "the dogs leash costs $ 20"),
    ("Mr. Smith said \"hello\"", "mr. smith said hello"),
])
def test_tokens_are_those_of_the_java_tokeniser(sentence, tokens):
    """Expected values: the output of Stanford's PTBTokenizer as pycocoevalcap calls it."""
    assert " ".join(scoring.tokenise(sentence)) == tokens
