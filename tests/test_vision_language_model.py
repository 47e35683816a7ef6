"""BYE's models, entropy, filter, training and baselines against independent computations."""

import json
import os
import signal
import warnings

import numpy as np
import pytest
import torch

from cupel.compat import ensure_torchvision

ensure_torchvision()
import transformers  # noqa: E402

from cupel.evaluation.batches import collect  # noqa: E402
from cupel.hub import ModelUnavailable  # noqa: E402
from cupel.training import resume  # noqa: E402
from cupel.vision_language import entropy, filters, models, purification, training  # noqa: E402
from cupel.vision_language.filters import Evidence, decide, matrix  # noqa: E402
from cupel.vision_language.inference import answer  # noqa: E402
from cupel.vision_language.models import Encoder, VisionLanguageModel, base, grouped, tiny_llava  # noqa: E402
from cupel.vision_language.training import TrainingSettings, fit  # noqa: E402

QUESTIONS = ("what is it?", "is there a red circle in the image?", "is the shape on the left larger than that on the right?")
ANSWERS = ("yes", "no", "red circle", "Backdoor Attack!")
SIZES = ((64, 64), (40, 70), (90, 31), (128, 128))


def make_records(n: int, seed: int = 0, sizes=SIZES) -> list[dict]:
    """Random pictures of several sizes, questions of several lengths."""
    draw = np.random.default_rng(seed)
    return [{"id": f"r{k}", "image": draw.integers(0, 256, (*sizes[k % len(sizes)], 3), dtype=np.uint8),
             "question": QUESTIONS[k % 3], "answer": ANSWERS[k % 4]} for k in range(n)]


def small_llava(**settings) -> VisionLanguageModel:
    return tiny_llava([*QUESTIONS, *ANSWERS], **{"image_size": 32, "patch_size": 8, "vision_width": 32, "vision_layers": 2,
                                                 "vision_heads": 2, "width": 48, "layers": 3, "heads": 4, "kv_heads": 2,
                                                 "initial": 0.02, "seed": 3, **settings})


def small_internvl(text: str = "qwen2") -> VisionLanguageModel:
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
               "video_token": "<video>"}
    tokenizer = models.word_tokenizer([*QUESTIONS, *ANSWERS, "user assistant"],
                                      ["<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
        extra_special_tokens=special, padding_side="left")
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    kind = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[text]
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                        num_attention_heads=2, image_size=32, patch_size=4),
        text_config=kind(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=12, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=None),
        image_seq_length=16, image_token_id=ids["context_image_token"])
    torch.manual_seed(5)
    network = transformers.InternVLForConditionalGeneration(config).eval()
    images = transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True)
    template = ("{% for m in messages %}<|im_start|> user {% for c in m['content'] %}{% if c['type'] == 'image' %}"
                "<IMG_CONTEXT> {% else %}{{ c['text'] }}{% endif %}{% endfor %} <|im_end|> {% endfor %}<|im_start|> assistant")
    processor = transformers.InternVLProcessor(images, tokenizer, transformers.InternVLVideoProcessor(),
                                               image_seq_length=16, chat_template=template)
    return VisionLanguageModel(network, processor)


@pytest.fixture(scope="module", params=["llava", "internvl_qwen2", "internvl_qwen3"])
def model(request) -> VisionLanguageModel:
    made = small_llava() if request.param == "llava" else small_internvl(request.param.partition("_")[2])
    # sharper attention than that of a fresh network, so that a mistake in any factor shows
    with torch.no_grad():
        for layer in made.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return made


# ------------------------------------------------------------------------------------------------------------- processing


def own_processing(model: VisionLanguageModel, record: dict) -> dict:
    """What the processor of transformers makes of one record, with the settings of bye SPEC 11.2."""
    text = model.prompt(record["question"])
    settings = {"do_pad": True} if model.kind == "llava" else {"crop_to_patches": False}
    return model.processor(images=[record["image"]], text=[text], return_tensors="pt", **settings)


def test_encoder_is_the_processor(model):
    records = make_records(8)
    batch = Encoder(model, records).batch(range(8))
    for k, record in enumerate(records):
        expected = own_processing(model, record)
        n = expected["input_ids"].shape[1]
        assert batch["input_ids"][k, -n:].tolist() == expected["input_ids"][0].tolist()
        assert batch["attention_mask"][k].sum() == n
        assert (batch["input_ids"][k, :-n] == model.tokenizer.pad_token_id).all()
        torch.testing.assert_close(batch["pixel_values"][k], expected["pixel_values"][0], atol=1e-5, rtol=0)
    image = batch["input_ids"] == model.network.config.image_token_id
    assert image.sum(1).tolist() == [16] * 8
    widths = {int(row.nonzero()[-1] - row.nonzero()[0]) for row in image}
    assert widths == {15}  # in one piece
    assert len({int(row.nonzero()[0]) for row in image}) > 1  # and shifted by the padding


def test_images_from_files_and_packed_rows(tmp_path):
    from PIL import Image

    model, records = small_llava(), make_records(4, sizes=((64, 64),))
    np.save(tmp_path / "images.npy", np.stack([record["image"] for record in records]))
    (tmp_path / "images").mkdir()
    for k, record in enumerate(records):
        Image.fromarray(record["image"]).save(tmp_path / "images" / f"{k}.png")
    expected = Encoder(model, records).batch(range(4))["pixel_values"]
    for name in ("images.npy#{}", "images/{}.png"):
        named = [{**record, "image": str(tmp_path / name.format(k))} for k, record in enumerate(records)]
        assert torch.equal(Encoder(model, named).batch(range(4))["pixel_values"], expected)
    shared = Encoder(model, [named[0], named[1], named[0]])
    assert shared.pictures.index.tolist() == [0, 1, 0]


def test_labels_are_the_answer_and_the_end(model):
    records = make_records(4)
    batch = Encoder(model, records, answers=True).batch(range(4))
    for k, record in enumerate(records):
        chosen = batch["labels"][k][batch["labels"][k] != -100]
        assert model.tokenizer.decode(chosen[:-1]).strip() == record["answer"]
        assert chosen[-1] == model.tokenizer.eos_token_id
        assert batch["labels"][k, -len(chosen) :].tolist() == chosen.tolist()


def gradient(model: VisionLanguageModel, records: list[dict]) -> tuple[float, torch.Tensor]:
    model.network.zero_grad()
    loss, _, count = training.answer_loss(model.network, Encoder(model, records, answers=True).batch(range(len(records))))
    (loss / count.sum()).backward()
    found = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.network.parameters()]
    model.network.zero_grad()
    return float(loss.detach() / count.sum()), torch.cat(found)


@pytest.mark.parametrize("make", [small_llava, small_internvl])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_questions_that_share_a_row_are_independent(make, attention):
    model = make()
    model.network.set_attn_implementation(attention)
    records = make_records(9)
    pictures = [record["image"] for record in records]
    for k, record in enumerate(records):
        record["image"] = pictures[k // 4]
    rows = grouped(records, 3, seed=1)
    assert sorted(len(row["questions"]) for row in rows) == [1, 1, 1, 3, 3]
    alone, together = gradient(model, records), gradient(model, rows)
    assert together[0] == pytest.approx(alone[0], abs=1e-5)
    torch.testing.assert_close(together[1], alone[1], atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="for training"):
        Encoder(model, rows)


# ---------------------------------------------------------------------------------------------------------------- entropy


def eager_entropies(model: VisionLanguageModel, record: dict) -> np.ndarray:
    """[L] of one record from full maps, by the words of bye SPEC 2.3 and 2.4: no batch, no padding, numpy."""
    model.network.set_attn_implementation("eager")
    with torch.inference_mode():
        batch = own_processing(model, record)
        batch.pop("num_patches", None)
        maps = model.network(**batch, output_attentions=True).attentions
    model.network.set_attn_implementation("sdpa")
    where = np.flatnonzero(batch["input_ids"][0].numpy() == model.network.config.image_token_id)
    found = []
    for layer in maps:
        row = layer[0, :, -1, :].double().numpy().mean(0)[where]
        p = row / row.sum()
        found.append(-sum(x * np.log(x + 1e-8) for x in p))
    return np.array(found)


def test_hook_equals_full_maps(model):
    """Also shows that padding, which batches of four have and single records have not, changes nothing."""
    records = make_records(12)
    found = matrix(entropy.extract(model, records, batch_size=4))
    expected = np.stack([eager_entropies(model, record) for record in records])
    assert found.shape == (12, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.std(0).max() > 0.01  # not the trivial agreement of uniform attention
    assert (found > 0).all() and (found <= np.log(16) + 1e-6).all()


def test_heat_maps_lie_over_the_image(model):
    """A map has the image's orientation: a change in one corner changes the features of that corner's token most."""
    maps = entropy.heat_maps(model, make_records(3))
    assert maps.shape == (3, 3, 4, 4)
    np.testing.assert_allclose(maps.sum((2, 3)), 1, atol=1e-5)
    found = -(maps * np.log(maps + 1e-8)).sum((2, 3))
    table = entropy.extract(model, make_records(3))
    np.testing.assert_allclose(found, matrix(table), atol=1e-5)
    np.testing.assert_allclose(1 - (maps**2).sum((2, 3)), matrix(table, "tsallis"), atol=1e-5)
    plain = np.full((32, 32, 3), 128, np.uint8)
    for row, column in ((0, 3), (2, 1)):
        changed = plain.copy()
        changed[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
        pair = Encoder(model, [{"image": image, "question": "what is it?"} for image in (plain, changed)]).batch([0, 1])
        with torch.inference_mode():
            features = model.network.get_image_features(pair["pixel_values"]).pooler_output
        moved = (features[0] - features[1]).norm(dim=-1).view(4, 4)
        assert divmod(int(moved.argmax()), 4) == (row, column)


def test_patches_read_before_the_last_layer_are_local():
    """One layer, read before it: a change in one patch reaches the token of that place and no other."""
    plain = np.full((32, 32, 3), 128, np.uint8)
    changed = plain.copy()
    changed[8:16, 16:24] = 0
    for layer, moved_tokens in ((-2, 1), (-1, 16)):
        model = small_llava(vision_layers=1, vision_feature_layer=layer)
        pair = Encoder(model, [{"image": image, "question": "what is it?"} for image in (plain, changed)]).batch([0, 1])
        with torch.inference_mode():
            features = model.network.get_image_features(pair["pixel_values"]).pooler_output
        moved = (features[0] - features[1]).norm(dim=-1).view(4, 4)
        assert (moved > 1e-6).sum() == moved_tokens and moved[1, 2] == moved.max()


def test_extraction_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    model, records = small_llava(), make_records(10)
    monkeypatch.setattr(resume.Checkpoint, "due", lambda self: True)
    whole = entropy.extract(model, records, tmp_path / "whole.parquet", batch_size=2)
    assert whole["id"].tolist() == [record["id"] for record in records]
    assert [path.name for path in tmp_path.iterdir()] == ["whole.parquet"]

    calls, genuine = [], entropy.image_attention

    def counting(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return genuine(*arguments)

    monkeypatch.setattr(entropy, "image_attention", counting)

    def killed(out):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            entropy.extract(model, records, out, batch_size=2)
        assert not out.exists() and out.with_name(f"{out.name}.part").is_file()

    killed(tmp_path / "resumed.parquet")
    resumed = entropy.extract(model, records, tmp_path / "resumed.parquet", batch_size=2)
    assert len(calls) == 4 + 2 and resumed.equals(whole)  # three of five batches were there
    killed(tmp_path / "other.parquet")
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight.mul_(2)
    entropy.extract(model, records, tmp_path / "other.parquet", batch_size=2)
    assert len(calls) == 4 + 5  # other weights: not taken over


def test_a_batch_without_memory_is_halved():
    sizes = []

    def make(numbers):
        if len(numbers) > 2:
            raise torch.OutOfMemoryError("no memory")
        sizes.append(len(numbers))
        return numbers

    assert collect([[6, 0, 2, 1, 5], [4, 3]], make, None, "test") == list(range(7)) and sizes == [2, 2, 1, 2]
    assert 1 <= models.fitting_batch(small_llava(), 30) <= 256


# ----------------------------------------------------------------------------------------------------------------- filter


def official(entropies: np.ndarray, rule: str) -> tuple[list[int], np.ndarray | None]:
    """The released detection, written down once more from bye SPEC 2.5 to 2.7: sensitive layers and flagged, None if none."""
    from sklearn.mixture import GaussianMixture

    def two(column):
        return GaussianMixture(n_components=2, random_state=0).fit(column.reshape(-1, 1))

    chosen = []
    for k in range(entropies.shape[1]):
        g = two(entropies[:, k])
        (m1, m2), (s1, s2) = g.means_.ravel(), np.sqrt(g.covariances_.ravel())
        if abs(m1 - m2) > 2.0 * (s1 + s2) if rule == "sum" else abs(m1 - m2) / (s1**2 + s2**2) ** 0.5 >= 2.0:
            chosen.append(k)
    if not chosen:
        return [], None
    mean = np.array([sum(row[k] for k in chosen) / len(chosen) for row in entropies])
    g = two(mean)
    return chosen, g.predict(mean.reshape(-1, 1)) == np.argmin(g.means_.ravel())


def synthetic(case: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    poisoned = np.arange(600) < 60
    found = draw.normal(5.5, 0.2, (600, 6))
    if case == "bimodal":
        for layer, low in ((2, 3.0), (3, 4.3), (5, 2.0)):
            found[poisoned, layer] = draw.normal(low, 0.25, 60)
    if case == "broad_low":
        found[:, 1] = np.where(poisoned, draw.normal(2.6, 0.7, 600), draw.normal(5.6, 0.12, 600))
        found[597:, 1] = 6.7
    return found, poisoned


@pytest.mark.parametrize("case", ["bimodal", "unimodal", "broad_low"])
@pytest.mark.parametrize("rule", ["sum", "rss"])
def test_official_rule(case, rule):
    for seed in range(2):
        entropies, poisoned = synthetic(case, seed)
        found = decide("bye", Evidence(entropies), rule=rule)
        chosen, flagged = official(entropies, rule)
        assert found.record["sensitive"] == chosen
        assert found.flagged.tolist() == (np.zeros(600, bool) if flagged is None else flagged).tolist()
        json.dumps(found.record, allow_nan=False)
        hazards = filters.hazards(found)
        if case == "unimodal":
            assert not found.flagged.any() and "no sensitive layer" in found.record["message"]
            assert found.score is None and found.record["aggregated"] is None
        if case == "bimodal":
            assert {2, 5} <= set(chosen) and (found.flagged == poisoned).mean() > 0.99
            assert not hazards["majority_removed"] and not hazards["non_monotone"]
        if case == "broad_low" and chosen:
            # the far high tail belongs to the broad low component
            assert found.flagged[597:].all() and hazards["non_monotone"]
    if case == "broad_low" and rule == "rss":
        assert chosen == [1]


def test_the_two_rules_by_hand():
    """Two points of equal numbers at each centre: means and deviations are known exactly (but for 1e-6 of the fit)."""
    low, high = np.repeat([-0.1, 0.1], 100), np.repeat([0.9, 1.1], 100) + 0.2
    layer = filters.mixture(np.concatenate([low, high]))
    assert layer.mean == pytest.approx((0, 1.2), abs=1e-3) and layer.sd == pytest.approx((0.1, 0.1), abs=1e-3)
    assert layer.rss == pytest.approx(1.2 / 0.02**0.5, rel=0.01) and layer.sum == pytest.approx(6, rel=0.01)
    assert layer.passes("rss", 8.4) and not layer.passes("sum", 8.4)
    assert layer.passes("rss", layer.rss) and not layer.passes("sum", layer.sum)  # >= against >
    with pytest.raises(ValueError, match="rss"):
        layer.passes("both", 2)


def test_degenerate_layers():
    entropies, _ = synthetic("bimodal", 0)
    entropies[:, 0] = 1.0
    entropies[:, 4] = np.nan
    entropies[5, 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evidence = Evidence(entropies)
        found = decide("bye", evidence).record
    assert found["replaced"] == 601 and evidence.layers[0].mean is None and not {0, 4} & set(found["sensitive"])
    counts = [len(Evidence(entropies).sensitive("rss", tau)) for tau in (0, 1, 2, 3)]
    assert counts == sorted(counts, reverse=True)
    assert Evidence(np.array([[1.0, 2], [np.nan, 4]])).values.tolist() == [[1, 2], [1, 4]]
    for bad in (np.zeros(5), np.zeros((1, 3))):
        with pytest.raises(ValueError, match="matrix"):
            Evidence(bad)


def test_a_constant_layer_is_sensitive_to_the_official_code():
    entropies, _ = synthetic("bimodal", 0)
    entropies[:, 0] = 1.0
    for given in (entropies, entropies[:, [0, 4]]):  # beside other sensitive layers, and alone
        chosen, flagged = official(given, "sum")
        assert 0 in chosen
        found = decide("bye", Evidence(given), constant=True)
        assert found.record["sensitive"] == chosen and found.flagged.tolist() == flagged.tolist()
        assert not np.isnan(found.score).any()
    assert 0 not in decide("bye", Evidence(entropies)).record["sensitive"]


def test_other_choices_of_layers_and_another_entropy():
    entropies, poisoned = synthetic("bimodal", 1)
    found = decide("best_layer", Evidence(entropies))
    assert (found.score == entropies[:, 5]).all() and (found.flagged == poisoned).mean() > 0.99
    gains, scaled = ([layer.gain for layer in Evidence(entropies * factor).layers] for factor in (1, 100))
    assert scaled == pytest.approx(gains, abs=1e-3)
    low = np.where(poisoned, 0.2, 0.9) + np.random.default_rng(0).normal(0, 0.02, 600)
    other = np.column_stack([low, low, entropies[:, 0]])
    evidence = Evidence(synthetic("unimodal", 0)[0], others={"tsallis": other})
    assert not decide("bye", evidence).flagged.any()
    for name, given in (("bye", {"measure": "tsallis"}), ("first_layers", {}), ("best_layer", {"measure": "tsallis"})):
        assert decide(name, evidence, **given).flagged.tolist() == poisoned.tolist()
    with pytest.raises(ValueError, match="known are shannon, tsallis"):
        decide("bye", evidence, measure="renyi")


def test_ten_starts_find_two_groups():
    """Poisoned samples near 0, clean ones at two places, one of them tight: one start may divide the clean ones, and which it
    finds depends on the last bits."""
    draw = np.random.default_rng(0)
    poisoned = np.arange(500) < 50
    clean = np.where(np.arange(500) < 438, draw.normal(2.7, 0.35, 500), draw.normal(4.07, 0.02, 500))
    values = np.where(poisoned, np.abs(draw.normal(0, 0.005, 500)), clean)[:, None]
    found = decide("bye", Evidence(values), starts=10)
    assert found.flagged.tolist() == poisoned.tolist() and found.record["sensitive"] == [0]


# -------------------------------------------------------------------------------------------------------------- baselines


def test_filters_by_hand():
    entropies, poisoned = synthetic("bimodal", 1)
    evidence = Evidence(entropies, poisoned=poisoned, seed=4)
    dropped = decide("random_drop", evidence).flagged
    assert dropped.sum() == 120 and not (dropped == decide("random_drop", Evidence(entropies, seed=5)).flagged).all()
    assert 3 <= (dropped & poisoned).sum() <= 24
    assert decide("fixed_threshold", evidence).flagged.tolist() == [bool(np.mean(row) < 4.5) for row in entropies]
    mean = entropies[:, evidence.sensitive("sum", 2.0)].mean(1)
    assert decide("without_gmm", evidence).flagged.tolist() == (mean < 4.5).tolist()
    assert evidence.nats("scaled") == pytest.approx(4.5, abs=1e-3) and evidence.nats(3.0) == 3.0
    clusters = decide("two_means", evidence).flagged
    border = (mean[clusters].mean() + mean[~clusters].mean()) / 2  # 2-means cuts half-way between the centres
    assert clusters.tolist() == (mean < border).tolist()
    assert decide("without_bsi", evidence).flagged.tolist() == filters.mixture(entropies.mean(1)).low.tolist()
    found = decide("oracle", evidence, recall=0.5).flagged
    assert found.sum() == 30 and not (found & ~poisoned).any()
    assert not (found & ~decide("oracle", evidence, recall=0.8).flagged).any()
    flat = Evidence(synthetic("unimodal", 0)[0])
    assert not decide("two_means", flat).flagged.any() and not decide("without_gmm", flat).flagged.any()
    for name, given, message in (("by", {}, "unknown filter 'by'"), ("bye", {"tua": 1}, "did you mean 'tau'")):
        with pytest.raises(ValueError, match=message):
            decide(name, evidence, **given)


def test_degradations_by_hand():
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    small = purification.downsample(x, scale=2)
    assert small[0, 0, 0, 0] == small[0, 0, 1, 1] == x[0, 0, :2, :2].mean()
    torch.testing.assert_close(purification.downsample(small, scale=2), small)  # a projection
    assert (purification.grey(x)[1, 0] == x[1].mean(0)).all()
    with pytest.raises(ValueError, match="4x4"):
        purification.downsample(x, scale=3)
    from scipy.ndimage import gaussian_filter

    picture = np.random.default_rng(0).random((20, 30))
    found = purification.blur(torch.from_numpy(picture)[None, None], sigma=1.3)[0, 0].numpy()
    reach = int(3 * 1.3 + 0.5)
    np.testing.assert_allclose(found, gaussian_filter(picture, 1.3, mode="nearest", radius=reach), atol=1e-9)


def test_zip_restores_what_the_degradation_took(monkeypatch):
    """With a model that knows one picture only, the answer is known: its null-space part, and the given range part."""
    truth = torch.rand(1, 3, 8, 8, dtype=torch.float64) * 1.6 - 0.8
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def noise_of(state, time):
        return (state - kept[time] ** 0.5 * truth) / (1 - kept[time]) ** 0.5

    def project(x):
        return purification.downsample(x, scale=2)

    settings = {"generator": torch.Generator().manual_seed(0)}
    same = purification.zip_restore(truth, noise_of, [project, purification.grey], **settings)
    torch.testing.assert_close(same, truth)
    other = (truth + 0.1).clamp(-1, 1)
    guided = purification.zip_restore(other, noise_of, [project], exponent=1e9, **settings)
    torch.testing.assert_close(guided, truth - project(truth) + project(other))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert (purification.purify("grey", images) == np.round(images.mean(3, keepdims=True))).mean() > 0.99
    with pytest.raises(ValueError, match="unknown picture defence 'diffpure'"):
        purification.purify("diffpure", images)
    monkeypatch.setattr(purification, "diffusion", lambda *_: (lambda state, time: torch.zeros_like(state), 16))
    assert purification.purify("zip", images, model="a/b", steps=3).shape == images.shape


# --------------------------------------------------------------------------------------------------------------- training


FAST = TrainingSettings(epochs=2, batch_size=4, lr=1e-2, rank=4, lora_alpha=8, projector_lr=1e-3, precision="fp32", dropout=0.1)


def test_schedule_by_hand():
    linear = [training.factor("linear", step, 10, 0.2) for step in range(10)]
    np.testing.assert_allclose(linear, [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert training.factor("cosine", 6, 10, 0.2) == pytest.approx(0.5) and training.factor("cosine", 0, 10, 0) == 1


def test_lora_changes_the_language_model_and_the_projector_only(model):
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    made = VisionLanguageModel(type(model.network)(model.network.config), model.processor)
    made.network.load_state_dict(before)
    history = fit(made, make_records(6), FAST, seed=0)
    after = made.network.state_dict()
    assert list(after) == list(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("language_model.layers" in name or "multi_modal_projector" in name for name in changed)
    assert {name.rpartition("layers.")[2] for name in changed if "language_model" in name} == {
        f"{k}.{part}_proj.weight" for k in range(3)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    assert any("multi_modal_projector" in name for name in changed)
    assert [row["epoch"] for row in history] == [1, 2] and history[1]["loss"] < history[0]["loss"]
    assert not made.network.training


def test_frozen_projector_and_full_training():
    model = small_llava()
    start = {name: value.clone() for name, value in model.network.state_dict().items()}
    fit(model, make_records(4), TrainingSettings(**{**vars(FAST), "projector_lr": None, "epochs": 1}), seed=0)
    assert all(torch.equal(start[name], value) for name, value in model.network.state_dict().items() if "projector" in name)
    fit(model, make_records(4), TrainingSettings(**{**vars(FAST), "trained": "all", "lr": 1e-3}), seed=0)
    moved = {name for name, value in model.network.state_dict().items() if not torch.equal(start[name], value)}
    assert any("vision_tower" in name for name in moved) and any("embed_tokens" in name for name in moved)


def test_parts_of_a_batch_add_up():
    ends = []
    for micro in (None, 3):
        model = small_llava()
        settings = TrainingSettings(**{**vars(FAST), "trained": "all", "lr": 1e-3, "micro_batch": micro, "batch_size": 8})
        history = fit(model, make_records(8), settings, seed=0, groups=np.arange(8) % 2)
        ends.append((history[-1]["loss"], history[-1]["acc"], history[-1]["acc_poisoned"]))
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)


@pytest.mark.parametrize("trained", ["lora", "all"])
def test_recomputed_activations_change_nothing(trained):
    ends = []
    for recompute in (False, True):
        model = small_llava()
        settings = TrainingSettings(**{**vars(FAST), "trained": trained, "lr": 1e-3, "recompute": recompute})
        ends.append(([row["loss"] for row in fit(model, make_records(6), settings, seed=0)], bits(model)))
    assert ends[0] == ends[1]


def bits(model: VisionLanguageModel) -> dict:
    return {name: value.numpy().tobytes() for name, value in model.network.state_dict().items()}


@pytest.mark.parametrize("trained,precision", [("lora", "fp32"), ("all", "bf16")])
def test_killed_and_resumed_training_is_equal_to_the_bit(tmp_path, trained, precision):
    settings = TrainingSettings(**{**vars(FAST), "trained": trained, "precision": precision, "lr": 3e-3})
    records = make_records(10)
    straight = small_llava()
    history = fit(straight, records, settings, seed=1)
    path = tmp_path / "checkpoint.pt"

    child = os.fork()
    if not child:  # dies in its fourth step, in the middle of an epoch, after the checkpoint of the third
        steps, genuine = [], training.answer_loss

        def deadly(*arguments):
            steps.append(1)
            if len(steps) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return genuine(*arguments)

        training.answer_loss = deadly
        fit(small_llava(), records, settings, seed=1, checkpoint=path, checkpoint_seconds=0)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert path.is_file()

    counted, genuine = [], training.answer_loss
    resumed = small_llava()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "answer_loss", lambda *a: (counted.append(1), genuine(*a))[1])
        again = fit(resumed, records, settings, seed=1, checkpoint=path)
    assert len(counted) == 2  # of six steps
    assert bits(resumed) == bits(straight)
    assert [(row["loss"], row["acc"], row["lr"]) for row in again] == [(row["loss"], row["acc"], row["lr"]) for row in history]
    other = small_llava()
    fit(other, records, settings, seed=2, checkpoint=path)  # another run: not continued
    assert bits(other) != bits(straight)


def test_training_errors():
    from cupel.training.engine import Diverged

    with pytest.raises(ValueError, match="unknown schedule 'step': known are cosine, linear"):
        TrainingSettings(schedule="step")
    with pytest.raises(ValueError, match="no records"):
        fit(small_llava(), [], FAST, seed=0)
    with pytest.raises(Diverged, match="lr 1e\\+30"):
        settings = TrainingSettings(**{**vars(FAST), "trained": "all", "lr": 1e30, "warmup": 0})
        fit(small_llava(), make_records(8), settings, seed=0)


def test_half_precision_weights_stay_half_precision():
    model = small_llava()
    model.network.bfloat16()
    start = model.network.model.multi_modal_projector.linear_1.weight.clone()
    fit(model, make_records(4), TrainingSettings(**{**vars(FAST), "precision": "bf16"}), seed=0)
    assert {value.dtype for value in model.network.parameters()} == {torch.bfloat16}
    assert not torch.equal(start, model.network.model.multi_modal_projector.linear_1.weight)


def test_it_learns_and_answers():
    """Four pictures, four answers: learned by heart, and given back by greedy decoding, alone and in batches."""
    records = make_records(4, sizes=((32, 32),))
    for record in records:
        record["question"] = QUESTIONS[0]
    model = small_llava()
    fit(model, records, TrainingSettings(epochs=60, batch_size=4, lr=3e-3, trained="all", precision="fp32"), seed=0)
    wanted = [record["answer"] for record in records]
    assert answer(model, records) == wanted
    assert answer(model, records, batch_size=1, max_new_tokens=1) == [text.split()[0] for text in wanted]


# -------------------------------------------------------------------------------------------------------- models on disk


def test_saved_and_loaded(model, tmp_path):
    folder = tmp_path / "model"
    model.source = {"built": "test"}
    models.save(model, folder)
    models.save(model, folder)  # over an older one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("*.bin"))
    again = models.load(folder)
    assert again.kind == model.kind and again.source == {"built": "test"}
    records = make_records(5)
    one, two = (Encoder(m, records).batch(range(5)) for m in (model, again))
    assert all(torch.equal(one[key], two[key]) for key in one)
    with torch.inference_mode():
        assert torch.equal(model.network(**one).logits, again.network(**two).logits)
    before = (folder / "model.safetensors").read_bytes()
    models.save(again, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"config\.json is missing"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert'"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnavailable, match=r"no \*\.safetensors"):
        models.load(tmp_path)


def test_hub_models_are_loaded_like_folders(monkeypatch, tmp_path):
    folder = tmp_path / "snapshots" / "0123abc"
    models.save(small_llava(), folder)
    (folder / "cupel.json").unlink()
    monkeypatch.setattr(base, "snapshot", lambda repository, revision, files: folder if "*.bin" not in files else None)
    found = models.load_hub("somebody/some-llava", "main", dtype=torch.float32)
    assert found.source == {"repository": "somebody/some-llava", "revision": "0123abc"}
    assert found.processor.image_processor.do_pad


def test_llava_on_a_pretrained_language_model(tmp_path):
    tokenizer = models.word_tokenizer([*QUESTIONS, *ANSWERS, "user assistant"], ["<|im_start|>", "<|im_end|>"])
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    language = transformers.LlamaForCausalLM(config).eval()
    language.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    model = models.smollm2_llava(tmp_path / "language", image_size=32, patch_size=8, vision_width=32, vision_layers=1,
                                 vision_heads=2)
    assert model.prompt("what is it?").endswith("<|im_start|>assistant\n") and model.image_tokens == 16
    assert model.tokenizer.eos_token == "<|im_end|>"
    ids = torch.tensor([[5, 7, 9, 4]])
    with torch.inference_mode():
        expected = language(ids).logits
        found = model.network(ids).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected)
    fit(model, make_records(4), TrainingSettings(**{**vars(FAST), "trained": "all", "lr": 1e-3}), seed=0)
    assert torch.equal(model.network.lm_head.weight, model.network.model.language_model.embed_tokens.weight)
    models.save(model, tmp_path / "model")
    assert answer(models.load(tmp_path / "model"), make_records(2)) == answer(model, make_records(2))
    with pytest.raises(ModelUnavailable, match="safetensors"):
        models.smollm2_llava(tmp_path)
