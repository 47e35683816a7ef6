"""Classifiers: the papers' sizes, the split into extractor and head, checkpoints, and torchvision on any torch."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import save_file
from torch import nn

import cupel
from cupel.images.models import MODELS, NotACheckpoint, Parts, WeightsUnavailable, build, load, pretrained, save

# M parameters, convolutions, their output channels (IMS mask entries), M multiply-accumulates at 32x32. 10 classes.
# Sources: ims SPEC 2.1 and 5; the rest measured here, None where no source gives a number.
SIZES = {
    "resnet18": (11.17, 20, 4800, 555),
    "preactresnet18": (11.2, 20, 4800, 555),
    "resnet50": (23.5, 53, None, None),
    "densenet161": (26.5, 160, None, None),
    "vgg19_bn": (139.6, 16, 5504, 518),
    "efficientnet_b3": (10.7, 130, 63728, 21.5),
    "mobilenet_v3_large": (4.2, 62, 17280, 7.1),
    "swin_t": (27.5, 1, None, None),
    "vit_b_16": (85.8, 1, 768, None),
}
SMALL = {"width": 8, "stem_stride": 2}


def pixels(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def small(**arguments):
    return build("preactresnet18", **{"num_classes": 10, "seed": 0, **SMALL, **arguments}).eval()


def run(code):
    """Run code in a fresh interpreter; importing torchvision cannot be undone in this one."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cupel.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


# ---------------------------------------------------------------- architectures


def test_every_model_has_a_known_size():
    assert SIZES.keys() == MODELS.keys()


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_channels(name):
    with torch.device("meta"):
        model = build(name, num_classes=10)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    parameters, count, channels, _ = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert len(convs) == count
    assert channels is None or sum(conv.out_channels for conv in convs) == channels
    assert model.head.out_features == 10


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size[3]])
def test_multiply_accumulates(name):
    macs = 0

    def count(module, _, output):
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    with torch.device("meta"):
        model = build(name, num_classes=10).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, 32, 32))
    assert macs / 1e6 == pytest.approx(SIZES[name][3], rel=0.01)


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("name", SIZES)
def test_shapes(name, size):
    maps = {}
    with torch.device("meta"):
        model = build(name, num_classes=7, image_size=size).eval()
        for stage in model.stages:
            hook = lambda module, args, output, stage=stage: maps.update({stage: output.shape})  # noqa: E731
            model.get_submodule(stage).register_forward_hook(hook)
        x = torch.empty(2, 3, size, size)
        assert model.features(x).shape == (2, model.head.in_features)
        assert model(x).shape == (2, 7)
    assert list(maps) == list(model.stages)
    assert len(maps) == (3 if "resnet" in name else 1)
    assert all(len(shape) == 4 and shape[2] == shape[3] for shape in maps.values()), maps
    widths = [shape[1] for shape in maps.values()]
    assert widths == sorted(widths)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_forward_at_any_size(size):
    model = small(image_size=size)
    x = pixels(2, 3, size, size)
    assert model.stages == ("extractor.layer2", "extractor.layer3", "extractor.layer4")
    assert model(x).shape == (2, 10)
    torch.testing.assert_close(model(x), model.head(model.features(x)), rtol=0, atol=0)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))


def test_hidden_linears_are_all_linears_but_the_head():
    for name in ("vgg19_bn", "mobilenet_v3_large", "efficientnet_b3", "preactresnet18", "resnet50", "densenet161"):
        with torch.device("meta"):
            model = build(name, num_classes=10)
        linears = tuple(key for key, module in model.named_modules() if isinstance(module, nn.Linear))
        assert linears == (*model.hidden_linears, "head")


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "efficientnet_b3", "swin_t", "vit_b_16"])
def test_split_keeps_torchvisions_function(name):
    model = build(name, num_classes=5, image_size=224, seed=3).eval()
    from torchvision.models import get_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = get_model(name, num_classes=5).eval()
    if name == "vit_b_16":  # its head starts at zero, which would hide a difference
        nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
        net.heads.head.load_state_dict(model.head.state_dict())
    x = pixels(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-5)


def test_resize_is_torchvisions():
    model = build("swin_t", num_classes=2, seed=0).eval()
    from torchvision.transforms import v2

    x = pixels(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), model(v2.Resize(224, antialias=True)(x)), rtol=1e-4, atol=1e-5)


def test_preactivation_shortcut_reads_the_activated_input():
    block = small().extractor.layer2[0]
    x = pixels(2, 8, 8, 8) - 0.5
    active = torch.relu(block.bn1(x))
    expected = block.conv2(torch.relu(block.bn2(block.conv1(active)))) + block.shortcut(active)
    torch.testing.assert_close(block(x), expected)
    plain = small().extractor.layer1[0]
    assert plain.shortcut is None
    nn.init.zeros_(plain.conv2.weight)
    torch.testing.assert_close(plain(x), x, rtol=0, atol=0)


# ---------------------------------------------------------------- build


def test_unknown_name_lists_the_names_and_the_nearest():
    with pytest.raises(ValueError, match="preactresnet18") as error:
        build("PreActResNet18", num_classes=10)
    assert "did you mean 'preactresnet18'" in str(error.value)
    assert all(name in str(error.value) for name in MODELS)


@pytest.mark.parametrize("option", [{"width": 32}, {"stem_stride": 2}])
def test_options_a_model_cannot_take(option):
    for name in MODELS.keys() - {"resnet18", "preactresnet18"}:
        with pytest.raises(ValueError, match="these can: preactresnet18, resnet18"):
            build(name, num_classes=10, **option)


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18"])
def test_no_pretrained_weights_for_own_networks(name):
    with pytest.raises(ValueError, match="these can: densenet161"):
        build(name, num_classes=10, pretrained=True)


@pytest.mark.parametrize("name", ["resnet50", "densenet161"])
def test_no_pretrained_weights_for_the_cifar_form(name):
    with pytest.raises(ValueError, match="image_size >= 128"):
        build(name, num_classes=10, pretrained=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_classes": 0},
        {"width": 0},
        {"stem_stride": 1.5},
        {"image_size": True},
        {"std": (0.0, 1.0, 1.0)},
        {"mean": (0.4, 0.5)},
        {"mean": ()},
    ],
)
def test_senseless_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        small(**wrong)


def test_vgg_refuses_images_it_would_shrink_to_nothing():
    with pytest.raises(ValueError, match="at least 32"):
        build("vgg19_bn", num_classes=10, image_size=28)


def test_normalisation_in_pixel_space():
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
    model, x = small(mean=mean, std=std), pixels(2, 3, 32, 32)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(model.normalize(x), expected)
    torch.testing.assert_close(model(x), model.head(model.extractor(expected)))
    assert {"normalize.mean", "normalize.std"} <= model.state_dict().keys()
    with pytest.raises(TypeError, match="uint8"):
        model((x * 255).to(torch.uint8))


@pytest.mark.parametrize("name", ["preactresnet18", "resnet18", "densenet161", "vgg19_bn", "swin_t", "vit_b_16"])
def test_grey_images(name):
    with torch.device("meta"):
        model = build(name, num_classes=10, in_channels=1).eval()
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 10)
        with pytest.raises(ValueError, match="1 image channels"):
            model(torch.empty(2, 3, 32, 32))


def test_seed_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = small(seed=5).state_dict()
    torch.rand(3)
    state = torch.get_rng_state()
    second = small(seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)
    small(seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], small(seed=6).state_dict()["head.weight"])
    torch.manual_seed(5)
    assert torch.equal(small(seed=None).head.weight, first["head.weight"])


def test_a_users_own_model(monkeypatch, tmp_path):
    def mine(*, num_classes, in_channels, image_size):
        extractor = nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Parts(extractor, nn.Linear(4, num_classes), stages=("0",))

    monkeypatch.setitem(MODELS, "mine", mine)
    model, x = build("mine", num_classes=3, seed=0), pixels(1, 3, 8, 8)
    save(model, tmp_path / "mine.safetensors")
    assert torch.equal(load(tmp_path / "mine.safetensors")(x), model(x))
    with pytest.raises(ValueError, match="cannot take width"):
        build("mine", num_classes=3, width=8)


# ---------------------------------------------------------------- pretrained weights


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(requests, "get", refuse)
    return tmp_path / "hub" / "checkpoints"


def test_weights_unavailable_says_what_to_put_where(no_network):
    with pytest.raises(WeightsUnavailable, match=r"MobileNet_V3_Large_Weights\.IMAGENET1K_V1") as error:
        build("mobilenet_v3_large", num_classes=10, pretrained=True)
    assert f"{no_network}{os.sep}mobilenet_v3_large-" in str(error.value)
    assert "no file is there" in str(error.value)
    assert error.value.__suppress_context__


def test_damaged_weights_are_not_used(no_network):
    from torchvision.models import Swin_T_Weights

    no_network.mkdir(parents=True)
    (no_network / Path(Swin_T_Weights.IMAGENET1K_V1.url).name).write_bytes(b"half a file")
    with pytest.raises(WeightsUnavailable, match="damaged"):
        build("swin_t", num_classes=10, pretrained=True)


def test_pretrained_weights_with_a_fresh_head(monkeypatch, tmp_path):
    build("mobilenet_v3_large", num_classes=2, seed=0)
    from torchvision.models import get_model

    donor = get_model("mobilenet_v3_large", num_classes=1000)
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    monkeypatch.setattr(pretrained, "weights_file", lambda weights: tmp_path / "donor.pth")
    model = build("mobilenet_v3_large", num_classes=10, pretrained=True)
    assert torch.equal(model.extractor.features[0][0].weight, donor.features[0][0].weight)
    assert torch.equal(model.extractor.classifier[0].weight, donor.classifier[0].weight)
    assert model.head.weight.shape == (10, 1280)
    assert model.spec["pretrained"] is True
    save(model, tmp_path / "model.safetensors")
    monkeypatch.setattr(pretrained, "weights_file", None)  # a checkpoint needs no ImageNet weights
    assert load(tmp_path / "model.safetensors").spec == model.spec
    with pytest.raises(ValueError, match="3 image channels"):
        build("mobilenet_v3_large", num_classes=10, in_channels=1, pretrained=True)


def test_weights_of_another_network_are_refused(monkeypatch, tmp_path):
    torch.save({"classifier.3.weight": torch.zeros(1)}, tmp_path / "donor.pth")
    monkeypatch.setattr(pretrained, "weights_file", lambda weights: tmp_path / "donor.pth")
    with pytest.raises(WeightsUnavailable, match="does not hold the weights"):
        build("mobilenet_v3_large", num_classes=10, pretrained=True)


def test_old_densenet_keys():
    rename = pretrained._current_key
    old = "features.denseblock1.denselayer1.norm.1.running_mean"
    assert rename(old) == "features.denseblock1.denselayer1.norm1.running_mean"
    with torch.device("meta"):
        keys = build("densenet161", num_classes=10, image_size=224).state_dict().keys()
    assert {rename(key) for key in keys} == set(keys)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["preactresnet18", "resnet18", "mobilenet_v3_large", "swin_t"])
def test_saved_model_is_bit_identical(name, tmp_path):
    options = SMALL if "resnet" in name else {}
    model, x = build(name, num_classes=10, mean=(0.4, 0.5, 0.6), seed=1, **options), pixels(2, 3, 32, 32)
    with torch.inference_mode():
        if name != "swin_t":
            model(x)  # moves the running statistics
        path = tmp_path / "new" / "model.safetensors"
        save(model, path)
        again = load(path)
        assert torch.equal(again.eval()(x), model.eval()(x))
    assert again.spec == model.spec == json.loads(json.dumps(model.spec))
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    if options:
        rebuilt = build(**again.spec)
        assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
            k: v.shape for k, v in again.state_dict().items()
        }


def test_channels_last_and_compiled_models_are_saved_alike(tmp_path):
    model = small().to(memory_format=torch.channels_last)
    save(torch.compile(model), tmp_path / "a.safetensors")
    save(small(), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_loading_draws_nothing_and_overwriting_is_safe(tmp_path):
    path = tmp_path / "model.safetensors"
    save(small(seed=1), path)
    state = torch.get_rng_state()
    model = load(path)
    assert torch.equal(torch.get_rng_state(), state)
    before = model.head.weight.clone()
    path.write_bytes(b"")  # a model that viewed the mapped file would die of a bus error here
    assert torch.equal(model.head.weight, before)
    save(small(seed=2), path)
    assert torch.equal(model.head.weight, before)


def test_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(small(), path)
    content = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cupel.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(small(seed=1), path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load(tmp_path / "none.safetensors")


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    save(small(), path)
    tensors, whole = small().state_dict(), path.read_bytes()

    def refused(match):
        with pytest.raises(NotACheckpoint, match=match) as error:
            load(path)
        assert str(path) in str(error.value)

    torch.save(small().state_dict(), path)
    refused("pickled")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused("pickled")
    path.write_bytes(b"hello")
    refused("damaged or another format")
    path.write_bytes(b"")
    refused("damaged or another format")
    path.write_bytes(whole[: len(whole) // 2])
    refused("damaged or another format")
    save_file(tensors, path)
    refused("of format None")
    save_file(tensors, path, metadata={"cupel": "[]"})
    refused("of format None")
    save_file(tensors, path, metadata={"cupel": '{"format": "cupel.classifier/1"}'})
    refused("does not say which model")

    def rewrite(tensors, **changes):
        spec = {**small().spec, **changes}
        save_file(tensors, path, metadata={"cupel": json.dumps({"format": "cupel.classifier/1", "spec": spec})})

    rewrite(tensors, name="resnet1")
    refused("unknown model 'resnet1'")
    rewrite(tensors, colour="red")
    refused("colour")
    rewrite({key: value for key, value in tensors.items() if key != "head.bias"})
    refused(r"Missing key.*head\.bias")
    rewrite({**tensors, "extra": torch.zeros(1)})
    refused("Unexpected key.*extra")
    rewrite(tensors, num_classes=11)
    refused(r"size mismatch for head\.bias")
    rewrite(tensors)
    load(path)
    with pytest.raises(NotACheckpoint, match="folder"):
        load(tmp_path)


# ---------------------------------------------------------------- torchvision on any torch


def test_torchvision_imports_here_and_only_when_needed():
    code = """
import sys, torch, cupel.images.models
from cupel.compat import ensure_torchvision
assert "torchvision" not in sys.modules
ensure_torchvision(); ensure_torchvision()
assert "torchvision" not in sys.modules
import torchvision
assert hasattr(torch.ops.torchvision, "nms")
ensure_torchvision()
from torchvision.transforms import v2
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_nothing_is_declared_where_the_extension_loads():
    code = """
import torch, cupel.compat
schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
loaded = []
def load_library(path):  # what the real extension does when it is loaded
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms" + schema); library.define("roi_align(Tensor input) -> Tensor")
    loaded.append((path, library))
torch.ops.load_library = load_library
cupel.compat.ensure_torchvision()
cupel.compat.ensure_torchvision()
assert len(loaded) == 1 and "_C" in loaded[0][0]
assert cupel.compat._stand_in is None
assert not hasattr(torch.ops.torchvision, "qnms")
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_nothing_is_declared_without_torchvision():
    code = """
import importlib.util, torch, cupel.compat
importlib.util.find_spec = lambda name: None
cupel.compat.ensure_torchvision()
assert cupel.compat._stand_in is None
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
