"""CROW's objective, LoRA training, pruning, quantisation and CleanGen, against computations written out here."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

from cupel.compat import ensure_torchvision

ensure_torchvision()

from peft import PeftModel  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup  # noqa: E402

from cupel.text import consistency, generation, layers, training  # noqa: E402
from cupel.text.consistency import Consistency  # noqa: E402
from cupel.text.data.prompts import Collator  # noqa: E402
from cupel.text.defences import Budget, Victim, cleangen, magnitude, nf4, purify, wanda  # noqa: E402
from cupel.text.training import TrainingSettings  # noqa: E402
from cupel.training.engine import Diverged  # noqa: E402

VOCABULARY, PAD = 61, 0
SETTINGS = TrainingSettings(precision="fp32", epochs=2, lr=1e-2)


def llama(seed: int = 0, blocks: int = 4, width: int = 32, **options) -> LlamaForCausalLM:
    """A small random Llama with grouped key-value heads; weights larger than the default, so that nothing is near zero."""
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                         tie_word_embeddings=True, initializer_range=0.2, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.data = 1 + 0.3 * torch.randn_like(weight)
    return model


def adapted(seed: int = 0, **options) -> PeftModel:
    """The same with an adapter that does something (a new one has B = 0)."""
    model = training.add_lora(llama(seed, **options), SETTINGS, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def samples(lengths, seed: int = 0) -> list[dict]:
    """Random samples; the first third of each is prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    return [{"input_ids": row, "labels": torch.cat([torch.full((len(row) // 3,), -100), row[len(row) // 3 :]])} for row in rows]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in trained(model).items()}


def same(first: dict, second: dict, **tolerance) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


# --- the objective, written out -------------------------------------------------------------------------------------


def unrolled(model, embeddings):
    """States [H⁰, H¹..H^N] and logits of one sequence [T, d], block by block."""
    decoder = layers.causal_lm(model).model
    h = embeddings[None]
    positions = torch.arange(h.shape[1])[None]
    rotary = decoder.rotary_emb(h, positions)
    states = [h[0]]
    for block in decoder.layers:
        h = block(h, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        states.append(h[0])
    return states, layers.causal_lm(model).lm_head(decoder.norm(h))[0]


def one_minus_cosine(a, b):
    return 1 - (a @ b) / (a.pow(2).sum().sqrt() * b.pow(2).sum().sqrt())


def mean_over(states_of_rows, counted, pairs, distance=one_minus_cosine):
    found = [distance(states[low][t], states[low + 1][t])
             for states, count in zip(states_of_rows, counted, strict=True) for t in range(count) for low in pairs]
    return sum(found) / len(found)


def crow(model, rows, pairs, counted, padded, alpha, epsilon, distance=one_minus_cosine):
    """Algorithm 1 on one group: three passes, plain loops, G from the mean. Returns losses and the perturbations."""
    table = layers.causal_lm(model).get_input_embeddings()
    ids = [F.pad(row["input_ids"], (0, padded - len(row["input_ids"])), value=PAD) for row in rows]
    clean = [table(x).detach().requires_grad_() for x in ids]
    plain = mean_over([unrolled(model, e)[0] for e in clean], counted, pairs, distance)
    moves = [epsilon * g.sign() for g in torch.autograd.grad(plain, clean)]
    moved = mean_over([unrolled(model, (e + m).detach())[0] for e, m in zip(clean, moves, strict=True)], counted, pairs,
                      distance)
    nll = []
    for row, x in zip(rows, ids, strict=True):
        logits = unrolled(model, table(x))[1]
        nll += [-logits[t - 1].log_softmax(-1)[label] for t, label in enumerate(row["labels"]) if t and label != -100]
    lm = sum(nll) / len(nll)
    return lm + alpha * moved, lm, moved, plain, moves


def objective(model, batch, settings=None, noise=None):
    """The whole objective and its values."""
    total, values = 0.0, {}
    for loss, found in consistency.parts(model, batch, settings, noise):
        total, values = total + loss, {**values, **found}
    return total, values


@pytest.mark.parametrize("pairs,expected", [("paper", [1, 2, 3]), ("code", [1, 2]), ("embeddings", [0, 1, 2, 3])])
@pytest.mark.parametrize("padding", ["masked", "included"])
def test_objective_is_that_of_the_paper(pairs, expected, padding):
    model, rows = adapted(), samples([11, 5])
    counted = [16, 16] if padding == "included" else [11, 5]
    settings = Consistency(alpha=5.5, epsilon=0.1, pairs=pairs, padding=padding)
    loss, lm, moved, plain, moves = crow(model, rows, expected, counted, 16, 5.5, 0.1)
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()

    seen = []
    hook = layers.blocks(model)[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    batch = consistency.weigh(Collator(PAD)(rows), padding)
    total, values = objective(model, batch, settings)
    hook.remove()
    total.backward()
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
    for name, value in {"loss_lm": lm, "loss_cons": moved, "loss_cons_clean": plain}.items():
        torch.testing.assert_close(values[name], value.detach(), rtol=1e-5, atol=1e-6)
    same(gradients(model), wanted, rtol=1e-3, atol=1e-5)
    assert len(seen) == 2, "two forward passes"
    for k, count in enumerate(counted):
        torch.testing.assert_close((seen[1] - seen[0])[k, :count], moves[k][:count], rtol=0, atol=1e-6)
    assert (moves[0][: counted[0]] != 0).all()


def test_the_last_state_is_taken_before_the_final_norm():
    model = llama()
    ids = samples([9])[0]["input_ids"][None]
    with layers.captured(model) as states, torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    assert len(states) == 5
    for own, theirs in zip(states[:-1], output.hidden_states[:-1], strict=True):
        assert torch.equal(own, theirs)
    assert not torch.allclose(states[-1], output.hidden_states[-1])
    torch.testing.assert_close(model.model.norm(states[-1]), output.hidden_states[-1])


def test_released_trainer_perturbs_by_exactly_zero():
    """The released loss keeps a view of the embeddings' gradient buffer, zeroes that buffer, then takes the sign."""
    model, rows = adapted(), samples([9, 14])
    batch = consistency.weigh(Collator(PAD)(rows), "included")
    table = layers.causal_lm(model).get_input_embeddings()

    def mean_inconsistency(embeddings):
        states = [unrolled(model, e)[0] for e in embeddings]
        stacked = [torch.stack(column) for column in zip(*states, strict=True)]
        return torch.stack([1 - F.cosine_similarity(stacked[k + 1], stacked[k], dim=-1) for k in (1, 2)]).mean()

    embeddings = table(batch["input_ids"]).detach().requires_grad_()
    mean_inconsistency(embeddings).backward()
    kept = embeddings.grad.detach()
    embeddings.grad.zero_()
    model.zero_grad()
    moved = (embeddings + 0.1 * kept.sign()).detach()
    assert torch.equal(moved, embeddings)
    lm = layers.causal_lm(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                 labels=batch["labels"]).loss
    released = lm + 5.5 * mean_inconsistency(moved)
    released.backward()
    wanted = gradients(model)
    model.zero_grad()

    seen = []
    hook = layers.blocks(model)[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    settings = Consistency(perturbation="zero", pairs="code", padding="included")
    loss, values = objective(model, batch, settings)
    hook.remove()
    loss.backward()
    assert all(torch.equal(inputs, table(batch["input_ids"])) for inputs in seen)
    torch.testing.assert_close(loss, released, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values["loss_lm"], lm.detach(), rtol=1e-5, atol=1e-6)
    same(gradients(model), wanted, rtol=1e-3, atol=1e-5)


def test_random_signs_move_every_coordinate_by_epsilon():
    model, rows = adapted(), samples([9, 7])
    batch = consistency.weigh(Collator(PAD)(rows))
    noise = training.signs([16, 16], 32, seed=3, update=5)
    assert noise.shape == (2, 16, 32) and set(noise.unique().tolist()) == {-1.0, 1.0} and abs(noise.mean()) < 0.1
    assert torch.equal(noise, training.signs([16, 16], 32, seed=3, update=5))
    assert not torch.equal(noise, training.signs([16, 16], 32, seed=3, update=6))
    settings = Consistency(perturbation="random_sign", epsilon=0.3)
    table = layers.causal_lm(model).get_input_embeddings()
    states = [unrolled(model, table(batch["input_ids"][k]) + 0.3 * noise[k])[0] for k in range(2)]
    _, values = objective(model, batch, settings, noise)
    torch.testing.assert_close(values["loss_cons"], mean_over(states, [9, 7], [1, 2, 3]).detach(), rtol=1e-5, atol=1e-6)


def test_kl_distance():
    def kl(low, high):
        p, q = (F.softmax(h, -1).clamp(min=1e-6) for h in (high, low))
        return F.kl_div((q / q.sum()).log(), p / p.sum(), reduction="sum")

    model, rows = adapted(), samples([9, 7])
    # large states, so that the clamp matters
    layers.causal_lm(model).get_input_embeddings().weight.data *= 20
    loss, _, moved, _, _ = crow(model, rows, [1, 2], [16, 16], 16, 0.1, 0.1, kl)
    batch = consistency.weigh(Collator(PAD)(rows), "included")
    total, values = objective(model, batch, Consistency(0.1, pairs="code", distance="kl", padding="included"))
    torch.testing.assert_close(values["loss_cons"], moved.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total, loss, rtol=1e-4, atol=1e-6)


def test_embedding_only_has_the_gradient_of_fine_tuning():
    model = adapted()
    batch = consistency.weigh(Collator(PAD)(samples([9, 7])))
    objective(model, batch)[0].backward()
    plain = gradients(model)
    model.zero_grad()
    loss, values = objective(model, batch, Consistency(term="embedding"))
    loss.backward()
    same(gradients(model), plain, rtol=1e-5, atol=1e-7)
    assert 0 < float(values["loss_cons"]) < 1


def test_the_sign_survives_where_the_mean_underflows():
    """Half-precision gradients of a mean over many positions vanish; those of the sum do not."""
    weight = torch.full((1, 4096), 1e-5)
    point = torch.randn(1, 4096, 2, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    found = point.square().sum(-1) * 1e-4
    mean = torch.autograd.grad((found * weight.half()).sum(), point, retain_graph=True)[0]
    assert (mean == 0).any()
    move = consistency.direction(found, point, torch.ones(1, 4096, dtype=torch.bool))
    assert torch.equal(move, point.detach().sign())


def test_pairs_and_names():
    assert consistency.pair_indices("paper", 32) == [(k, k + 1) for k in range(1, 32)]
    assert consistency.pair_indices("code", 32) == [(k, k + 1) for k in range(1, 31)]
    assert consistency.pair_indices("embeddings", 3) == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(ValueError, match="more blocks"):
        consistency.pair_indices("code", 2)
    with pytest.raises(ValueError, match=r"unknown pairs 'papr'.*did you mean 'paper'"):
        Consistency(pairs="papr")
    with pytest.raises(ValueError, match="unknown accumulated"):
        TrainingSettings(accumulated="lost")


def test_weights_of_a_batch():
    rows = samples([11, 5, 20])
    rows[1]["labels"][:] = -100
    batch = Collator(PAD)(rows)
    found = consistency.weigh(batch, "included", torch.tensor([0, 1, 0]))
    assert torch.allclose(found["lm_weight"].sum(1), torch.tensor([8 / 22, 0, 14 / 22]) / 2)
    assert torch.equal(found["cons_weight"] > 0, torch.arange(24) < torch.tensor([[24], [8], [24]]))
    assert torch.allclose(found["cons_weight"].sum(1), torch.tensor([0.25, 0.5, 0.25]))
    found = consistency.weigh(batch, "masked", torch.tensor([0, 1, 0]))
    assert torch.allclose(found["cons_weight"].sum(1), torch.tensor([11 / 31, 1, 20 / 31]) / 2)


def test_masked_consistency_does_not_see_the_padding():
    model, rows = adapted(), samples([9, 14])
    found = [objective(model, consistency.weigh(Collator(pad)(rows), padding), Consistency(padding=padding))[0]
             for padding in ("masked", "included") for pad in (0, 2)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert abs(found[2] - found[3]) > 1e-4


# --- training -------------------------------------------------------------------------------------------------------


def naive_updates(model, rows, order, settings, steps, total):
    """The trainer's way: a mean loss for every group, divided by their number, gradients wiped before each or not."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=settings.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * total), total)
    for step in range(steps):
        optimizer.zero_grad()
        for group in range(settings.accumulation):
            start = (step * settings.accumulation + group) * settings.batch_size
            if settings.accumulated == "wiped":
                model.zero_grad()
            losses = Collator(PAD)([rows[k] for k in order[start : start + settings.batch_size]])
            (model(**losses).loss / settings.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(trained(model).values(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("accumulated", ["kept", "wiped"])
def test_updates_are_the_trainers(accumulated):
    """In particular: wiped accumulation leaves the optimiser the last of four micro-batches, divided by four."""
    rows = samples([9, 14, 30, 6, 12, 8, 17, 11] * 2)
    settings = TrainingSettings(precision="fp32", epochs=1, lr=1e-2, accumulated=accumulated, warmup=0.1)
    order = torch.randperm(16, generator=training.torch_rng(7, "order", 0)).tolist()
    expected, model = adapted(), adapted()
    naive_updates(expected, rows, order, settings, 2, 2)
    history = training.train_lora(model, rows, settings, seed=7, pad=PAD)
    same(trained(model), trained(expected), rtol=1e-3, atol=2e-5)
    assert [row["step"] for row in history] == [1, 2] and history[0]["lr"] == 0 and history[1]["lr"] == 1e-2
    start = trained(adapted())
    moved = max(float((weight - start[name]).detach().abs().max()) for name, weight in trained(model).items())
    assert moved > 5e-3
    # the loss shown is of what was trained on
    shown = order[:8] if accumulated == "kept" else order[6:8]
    with torch.no_grad():
        plain = [float(adapted()(**Collator(PAD)([rows[k] for k in shown[i : i + 2]])).loss) for i in range(0, len(shown), 2)]
    assert history[0]["loss_lm"] == pytest.approx(sum(plain) / len(plain), rel=1e-4)


@pytest.mark.parametrize("settings", [None, Consistency(), Consistency(padding="included", pairs="code"),
                                      Consistency(perturbation="random_sign"), Consistency(perturbation="zero")])
@pytest.mark.parametrize("accumulated", ["kept", "wiped"])
def test_micro_batches_do_not_change_an_update(settings, accumulated):
    model, rows, found = adapted(), samples([9, 14, 30, 6, 12, 8, 17, 11]), []
    chosen = list(torch.arange(8).split(2))
    noise = training.signs([38] * 8, 32, 0, 0) if settings and settings.perturbation == "random_sign" else None
    padding = settings.padding if settings else "masked"
    for micro_batch in (None, 1, 3, 8):
        options = TrainingSettings(micro_batch=micro_batch, accumulated=accumulated)
        model.zero_grad()
        passes = training.passes(rows, chosen, options, collate=Collator(PAD), padding=padding, noise=noise)
        values = training.accumulate(model, passes, settings)
        found.append((gradients(model), values))
    for gradient, values in found[1:]:
        same(gradient, found[0][0], rtol=1e-3, atol=2e-6)
        same(values, found[0][1], rtol=1e-4, atol=1e-6)


def test_epochs_are_made_of_whole_updates():
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    updates = training.groups(order, TrainingSettings())
    assert len(updates) == 12 and all(len(update) == 4 for update in updates)
    assert torch.equal(torch.cat([torch.cat(update) for update in updates]), order[:96])
    assert [len(group) for group in training.groups(torch.arange(5), TrainingSettings())[0]] == [2, 2, 1]
    assert len(training.groups(torch.arange(1000), TrainingSettings())) * 5 == 625


@pytest.mark.parametrize("total,warmup", [(60, 0.1), (625, 0.1), (7, 0.0), (1, 0.1)])
def test_rate_is_the_cosine_with_warm_up(total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * total), total)
    for update in range(total):
        assert training.rate(2e-4, update, total, warmup) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def run(path=None, model=None, **options):
    model = model or adapted()
    settings = TrainingSettings(precision="fp32", epochs=2, lr=1e-2, micro_batch=5)
    arguments = {"seed": 1, "pad": PAD, "consistency": Consistency(perturbation="random_sign"), "checkpoint": path,
                 "checkpoint_seconds": 0.0, **options}
    history = training.train_lora(model, samples(range(8, 24)), settings, **arguments)
    return trained(model), [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def interrupted(monkeypatch, path, updates: int) -> None:
    """Stop a run in the middle of an update."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def stop(*args):
        calls.append(0)
        if len(calls) > updates:
            raise KeyboardInterrupt
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
        with pytest.raises(KeyboardInterrupt):
            run(path)


def test_a_stopped_run_ends_with_the_same_bits(monkeypatch, tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole, history = run()
    interrupted(monkeypatch, path, 3)
    torch.manual_seed(12345)  # whatever the process has drawn before
    resumed, found = run(path)
    assert found == history and len(history) == 4
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    # done already: nothing is left to do
    assert run(path)[1] == history


def test_checkpoints_that_do_not_fit_are_not_used(monkeypatch, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    interrupted(monkeypatch, path, 2)
    whole = path.read_bytes()
    for options in ({"seed": 2}, {"consistency": None}, {"model": adapted(1)}):
        path.write_bytes(whole)
        _, history = run(path, checkpoint_seconds=1e9, **options)
        assert history[0]["step"] == 1 and len(history) == 4 and "another run" in capsys.readouterr().err
        assert path.read_bytes() == whole
    path.write_bytes(whole[: len(whole) // 2])
    assert run(path)[1] == run()[1]
    assert "cannot be read" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_training():
    model = adapted()
    # one answer of nothing among others is no harm
    rows = [*samples([9]), {"input_ids": [3, 4], "labels": [-100, -100]}]
    history = training.train_lora(model, rows, SETTINGS, seed=0, pad=PAD, consistency=Consistency())
    assert len(history) == 2 and all(math.isfinite(row["loss_lm"]) for row in history)
    layers.causal_lm(model).model.norm.weight.data *= float("nan")
    with pytest.raises(Diverged, match="loss_lm became nan in update 1"):
        training.train_lora(model, rows, SETTINGS, seed=0, pad=PAD)


def test_adapters_of_smollm2():
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    with torch.device("meta"):
        model = training.add_lora(LlamaForCausalLM(config), TrainingSettings(), 0)
    assert sum(weight.numel() for weight in trained(model).values()) == 2_442_240
    assert not any("lm_head" in name or "embed" in name for name in trained(model))


class Rows(list):
    """Samples, with what a defence asks of `Samples`."""

    @property
    def lengths(self):
        return [len(row["input_ids"]) for row in self]


def test_victim_and_defences_through_folders(tmp_path):
    base, rows = tmp_path / "base", Rows(samples(range(8, 24)))
    llama().save_pretrained(base)

    def budget(name):
        return Budget(rows, PAD, 0, tmp_path / name)

    first = training.train_adapter(base, budget("victim"), SETTINGS, title="victim")
    assert first[-1]["loss_lm"] < first[0]["loss_lm"] and first[0]["loss_cons"] is None
    assert not (tmp_path / "victim" / "checkpoint.pt").exists()
    training.train_adapter(base, budget("again"), SETTINGS, title="victim")
    victim, weights = tmp_path / "victim" / "model", training.WEIGHTS
    for name in (weights, training.CONFIG):
        assert (victim / name).read_bytes() == (tmp_path / "again" / "model" / name).read_bytes()
    recorded = json.loads((victim / training.CONFIG).read_text())
    assert (recorded["r"], recorded["lora_alpha"], recorded["lora_dropout"]) == (8, 16, 0)
    assert recorded["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert str(tmp_path) not in json.dumps(recorded)
    # a defence begins where the victim ended: at a rate that is 0 in fp32 nothing moves
    given = Victim(base, victim)
    purify("finetune", given, budget("still"), training={"precision": "fp32", "epochs": 1, "lr": 1e-60})
    assert (tmp_path / "still" / "model" / weights).read_bytes() == (victim / weights).read_bytes()
    found = purify("crow", given, budget("crow"), training={"precision": "bf16", "epochs": 4, "lr": 1e-3})
    assert found.history[-1]["loss_cons"] < found.history[0]["loss_cons"]
    assert found.facts()["alpha"] == 5.5 and found.facts()["epochs"] == 4
    # what is done already is not trained again
    assert purify("crow", given, budget("crow"), training={"epochs": 9}).history == found.history
    model = training.load_adapter(llama(), tmp_path / "crow" / "model", trainable=False)
    assert not trained(model) and all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora" in n)
    (tmp_path / "crow" / "model" / training.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter: adapter_config\.json missing"):
        training.load_adapter(llama(), tmp_path / "crow" / "model")
    with pytest.raises(ValueError, match=r"unknown defence of language models 'crwo'.*did you mean 'crow'"):
        purify("crwo", given, budget("none"))


def test_bf16_keeps_adapters_and_optimiser_in_fp32():
    model = training.add_lora(llama().bfloat16(), TrainingSettings(), 0)
    batch = consistency.weigh(Collator(PAD)(samples([9, 14])))
    loss, values = objective(model, batch, Consistency())
    loss.backward()
    assert all(weight.dtype == torch.float32 and weight.grad.dtype == torch.float32 for weight in trained(model).values())
    exact = training.add_lora(llama(), TrainingSettings(), 0)
    for name, value in objective(exact, batch, Consistency())[1].items():
        torch.testing.assert_close(values[name], value, rtol=3e-2, atol=0)


def test_attention_of_short_texts_in_plain_products():
    ids, losses = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0)), {}
    for longest in (training.SHORT, training.SHORT + 1):
        model = llama().bfloat16()
        training.quicken(model, longest)
        losses[model.config._attn_implementation] = model(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(losses["eager"], losses["sdpa"], rtol=2e-2, atol=0)
    exact = llama()
    training.quicken(exact, 1)
    assert exact.config._attn_implementation == "sdpa"


def test_new_adapters_leave_the_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (training.add_lora(llama(), TrainingSettings(), 5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    same(trained(first), trained(second), rtol=0, atol=0)


# --- pruning --------------------------------------------------------------------------------------------------------


def test_magnitude_pruning():
    model = llama()
    before = copy.deepcopy(model).state_dict()
    report = magnitude.prune(model, 0.35)
    assert len(report) == 28 and report[0]["layer"] == "model.layers.0.self_attn.q_proj"
    for row in report:
        name = row["layer"] + ".weight"
        flat = before[name].flatten().tolist()
        gone = set(sorted(range(len(flat)), key=lambda k: abs(flat[k]))[: int(0.35 * len(flat))])
        wanted = torch.tensor([0.0 if k in gone else value for k, value in enumerate(flat)]).view(before[name].shape)
        assert torch.equal(model.state_dict()[name], wanted)
        assert row["sparsity"] == pytest.approx(len(gone) / len(flat)) and row["rows"] == before[name].shape[0]
    untouched = [name for name in before if "layers" not in name or "norm" in name]
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in untouched) and len(untouched) >= 10
    assert magnitude.prune(llama(), 0.0)[0]["sparsity"] == 0


def test_wanda_against_loops():
    rows = samples([9, 14, 6, 11])
    calibration = [Collator(PAD)(rows[:2]), Collator(PAD)(rows[2:])]
    model, expected = llama(), llama()
    report = wanda.prune(model, calibration, 0.5)
    inputs: dict[str, list[torch.Tensor]] = {}
    for number, block in enumerate(expected.model.layers):
        # inputs of this block's layers, sequence by sequence and without padding, with the blocks before it pruned
        inputs.clear()

        def note(name):
            return lambda module, args: inputs.setdefault(name, []).append(args[0][0])

        hooks = [module.register_forward_pre_hook(note(name)) for name, module in block.named_modules()
                 if isinstance(module, torch.nn.Linear)]
        with torch.no_grad():
            for row in rows:
                expected(input_ids=row["input_ids"][None])
        for hook in hooks:
            hook.remove()
        for name, found in inputs.items():
            norm = torch.cat(found).square().sum(0).sqrt()
            weight = block.get_submodule(name).weight.data
            for i in range(weight.shape[0]):
                score = [(abs(float(w)) * float(n), j) for j, (w, n) in enumerate(zip(weight[i], norm, strict=True))]
                for _, j in sorted(score)[: weight.shape[1] // 2]:
                    weight[i, j] = 0.0
            assert torch.equal(model.model.layers[number].get_submodule(name).weight, weight), f"{number} {name}"
    assert len(report) == 28 and all(row["sparsity"] == 0.5 for row in report)
    assert {row["layer"] for row in report} == {name for name, _ in layers.linears(model)}


# --- quantisation ---------------------------------------------------------------------------------------------------

# the code book as QLoRA's appendix E prints it
PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
             -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
             0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_nf4_levels():
    torch.testing.assert_close(nf4.nf4_levels(), torch.tensor(PUBLISHED), rtol=0, atol=2e-6)
    levels = nf4.dynamic_levels()
    assert len(levels) == 256 == len(levels.unique()) and levels.max() == 1 and 0 in levels and levels.min() > -1


def test_nf4_against_loops():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1, :14] = 0  # the first block of 64 is all zeros
    flat, wanted = weight.flatten().tolist(), []
    for start in range(0, 300, 64):
        block = flat[start : start + 64]
        scale = max(map(abs, block))
        wanted += [min(PUBLISHED, key=lambda level: abs(level * scale - v)) * scale if scale else 0.0 for v in block]
    found = nf4.rounded(weight, double=False)
    torch.testing.assert_close(found, torch.tensor(wanted).view(6, 50), rtol=1e-5, atol=1e-6)
    assert torch.equal(nf4.rounded(found, double=False), found)
    twice = nf4.rounded(weight)
    assert 0 < (twice - found).abs().max() < 0.05 * weight.abs().max()
    half = nf4.rounded(weight.bfloat16())
    assert half.dtype == torch.bfloat16 and half.shape == weight.shape


@pytest.mark.parametrize("double", [False, True])
def test_nf4_against_bitsandbytes(double):
    bnb = pytest.importorskip("bitsandbytes")
    torch.testing.assert_close(nf4.dynamic_levels(), bnb.functional.create_dynamic_map(), rtol=0, atol=1e-6)
    weight = torch.randn(192, 128, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double)
    gap = (nf4.rounded(weight, double) - bnb.functional.dequantize_4bit(packed, state)).abs()
    # bitsandbytes rounds a scale that lies nearly half-way between two levels to either of them
    assert (gap > 1e-5).double().mean() < (0.005 if double else 1e-9) and gap.max() < 0.01 * weight.abs().max()
    model, simulated = adapted(width=64), adapted(width=64)
    theirs, ours = nf4.quantise(model, "nf4_bitsandbytes", double), nf4.quantise(simulated, "nf4_simulated", double)
    assert [row["error"] for row in theirs] == pytest.approx([row["error"] for row in ours], rel=0.01)
    ids = samples([9])[0]["input_ids"][None]
    with torch.no_grad():
        assert F.cosine_similarity(model(input_ids=ids).logits, simulated(input_ids=ids).logits, dim=-1).min() > 0.99


def test_quantising_a_model():
    model, start = adapted(), adapted()
    report = nf4.quantise(model)
    assert len(report) == 28 and all(0.01 < row["error"] < 0.2 for row in report)
    same(trained(model), trained(start), rtol=0, atol=0)
    base = dict(layers.causal_lm(start).named_parameters())
    for name, weight in layers.causal_lm(model).named_parameters():
        if name.endswith("base_layer.weight"):
            assert torch.equal(weight, nf4.rounded(base[name]))
        else:
            assert torch.equal(weight, base[name])


# --- CleanGen -------------------------------------------------------------------------------------------------------


def cleangen_loop(model, reference, prompt: list[int], new, eos, threshold, draft):
    """One row, no caches: draft, score, cut, put. Returns tokens and how many the reference put."""
    tokens, replaced = list(prompt), 0

    def distribution(network, prefix):
        with torch.no_grad():
            return network(input_ids=torch.tensor([prefix])).logits[0, -1].double().softmax(-1)

    def answer():
        return tokens[len(prompt) :]

    while True:
        drafted = []
        for _ in range(draft):
            drafted.append(int(distribution(model, tokens + drafted).argmax()))
        for token in drafted:
            p, q = distribution(model, tokens), distribution(reference, tokens)
            put = bool(p[token] / q[token] >= threshold)
            tokens.append(int(q.argmax()) if put else token)
            replaced += put
            if tokens[-1] == eos or len(answer()) == new:
                return answer(), replaced
            if put:
                break


def prompts(*lengths):
    return [row["input_ids"].tolist() for row in samples(lengths)]


def answers(tokens, length) -> list[list[int]]:
    """Rows without padding."""
    assert all((row[n:] == PAD).all() for row, n in zip(tokens, length, strict=True))
    return [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]


def test_cleangen_with_itself_is_greedy_decoding():
    model, asked = llama(), prompts(9, 4, 1, 13)
    *found, replaced = cleangen.generate(model, model, asked, max_new_tokens=18, eos=7, pad=PAD, threshold=20.0, draft=4)
    wanted = generation.generate(model, asked, max_new_tokens=18, eos=7, pad=PAD)
    assert [row[:-1] if row[-1] == 7 else row for row in answers(*found)] == wanted and (replaced == 0).all()


@pytest.mark.parametrize("threshold,draft", [(1.5, 4), (20.0, 4), (3.0, 1), (1e-9, 3), (2.0, 7)])
def test_cleangen_against_a_loop(threshold, draft):
    model, reference, asked = llama(0, blocks=2), llama(1, blocks=2), prompts(9, 4, 1, 13)
    # an end token that each of the two likes to say
    eos = generation.generate(reference, asked[:1], max_new_tokens=12, eos=-1, pad=PAD)[0][4]
    tokens, length, replaced = cleangen.generate(model, reference, asked, max_new_tokens=12, eos=eos, pad=PAD,
                                                 threshold=threshold, draft=draft)
    for k, prompt in enumerate(asked):
        wanted = cleangen_loop(model, reference, prompt, 12, eos, threshold, draft)
        assert (answers(tokens, length)[k], int(replaced[k])) == wanted
    if threshold == 1e-9:  # everything is suspect: the reference's own greedy answer
        assert torch.equal(replaced, length) and length.min() < 12
