"""LoRA training of language models: victims, clean fine-tuning and CROW are one loop with different objectives.

The loop is written here and is not transformers' `Trainer`: the trainer's checkpoints pickle the optimiser and are
folders that can be half written, and its losses are normalised per forward pass, so that the size of a pass would change
the result. Here an update is defined by `batch` × `accumulation` samples alone: the mean over its `accumulation` groups of
a group's mean loss, as the trainer computes it (crow SPEC 2.3, 6); `micro_batch`, the rows of one pass, only fits memory.
Rows of an update are sorted by length before they are split, which leaves the sum as it is.

The base model's weights are frozen in fp32 or bf16; adapters and optimiser are float32 always. bf16 replaces the fp16 of
the paper, so that no loss scaling is needed, on GPU and CPU alike.

Orders are drawn from streams named by epoch, noise from streams named by update: a run continued from a checkpoint sees
the same batches, and on the CPU ends with the same bits.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from cupel.compat import ensure_torchvision
from cupel.files import atomic, write_json
from cupel.registry import unknown
from cupel.rng import derive, torch_rng
from cupel.text.consistency import Consistency, parts, weigh
from cupel.text.layers import causal_lm
from cupel.text.models import load_model
from cupel.text.prompts import Collator
from cupel.training.engine import Diverged
from cupel.training.resume import Checkpoint

ensure_torchvision()

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402
from peft.helpers import disable_input_dtype_casting  # noqa: E402

ACCUMULATED = ("kept", "wiped")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSSES = ("loss_lm", "loss_cons", "loss_cons_clean")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Settings:
    """How adapters are trained (crow SPEC 2.3, 6, 7).

    Attributes:
        epochs: passes over the data; 5.
        lr: peak learning rate: 2e-4 for victims and fine-tuning, 1e-3 for CROW.
        batch: samples of a group, over which losses are averaged; 2.
        accumulation: groups of an update; 4. What does not fill an update at the end of an epoch is left out, a different
            part each epoch; a set smaller than one update is one update.
        accumulated: `kept`, all groups count; `wiped`, the released trainer's: each group's loss computation zeroes the
            gradients before it, so that only the last group of an update reaches the optimiser, still divided by their
            number (crow SPEC 10.2). The others are not computed here, which saves time and changes nothing.
        micro_batch: rows of one forward pass; None: all of an update.
        warmup: share of the updates in which the rate rises from 0, before the cosine to 0.
        clip: largest norm of the gradient.
        rank, lora_alpha: of adapters that are made new; dropout is 0.
        precision: of the base model's weights, `fp32` or `bf16`.
    """

    epochs: int = 5
    lr: float = 2e-4
    batch: int = 2
    accumulation: int = 4
    accumulated: str = "kept"
    micro_batch: int | None = None
    warmup: float = 0.1
    clip: float = 1.0
    rank: int = 8
    lora_alpha: int = 16
    precision: str = "bf16"

    def __post_init__(self):
        for name, known in (("accumulated", ACCUMULATED), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), known))
        for name in ("epochs", "batch", "accumulation", "micro_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}: at least 1 is needed")


def add_lora(model: nn.Module, settings: Settings, seed: int) -> PeftModel:
    """New adapters on every linear layer of the decoder except the head: B is zero, A drawn from the stream `lora`.

    The model's own generator states are left as they are.
    """
    config = LoraConfig(r=settings.rank, lora_alpha=settings.lora_alpha, lora_dropout=0.0, target_modules="all-linear",
                        task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "lora"))
        return get_peft_model(model, config)


def load_adapter(model: nn.Module, folder: str | Path, trainable: bool = True) -> PeftModel:
    """The model with the adapter of a folder, which is trained further if `trainable`.

    Raises:
        FileNotFoundError: the folder holds no adapter, or only a part of one.
    """
    missing = [name for name in (WEIGHTS, CONFIG) if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no adapter: {' and '.join(missing)} missing (`save_adapter` writes both)")
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def _adapter(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU. (Asked for embeddings too, peft would look the base model up on the hub.)"""
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().cpu().contiguous() for name, value in found.items()}


def _checksum(tensor: Tensor) -> int:
    """Sum of the bits as integers: exact, so equal in whatever order it is summed."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.detach().view(kinds[tensor.element_size()]).sum(dtype=torch.int64))


def save_adapter(model: PeftModel, folder: str | Path, base: str = "") -> None:
    """Write the adapter in peft's format: weights first, the configuration, without which it is none, last.

    Equal adapters give equal bytes. `base` names the base model in the configuration; loading does not need it.
    """
    folder = Path(folder)
    (folder / CONFIG).unlink(missing_ok=True)
    with atomic(folder / WEIGHTS) as temporary:
        save_file(_adapter(model), temporary)
    config = model.peft_config["default"].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    write_json(folder / CONFIG, {**config, "base_model_name_or_path": base, "inference_mode": True})


def groups(count: int, settings: Settings, order: Tensor) -> Iterator[list[Tensor]]:
    """The updates of an epoch: each a list of groups, each the int64 indices of its samples.

    Args:
        count: number of samples.
        settings: `batch` and `accumulation`.
        order: permutation of the samples, int64 [count].
    """
    size = settings.batch * settings.accumulation
    for start in range(0, max(count - size, 0) + 1, size):
        yield list(order[start : start + size].split(settings.batch))


def rate(update: int, total: int, settings: Settings) -> float:
    """Learning rate of an update, counted from 0: linear warm-up from 0, then half a cosine towards 0."""
    warm = math.ceil(settings.warmup * total)
    if update < warm:
        return settings.lr * update / warm
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(total - warm, 1)))


def update_batches(encoded: Sequence[dict], chosen: list[Tensor], settings: Settings, collate: Collator, padding: str,
                   noise: Tensor | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """The passes of one update: weighted batches on the CPU, each with its rows of the noise.

    Args:
        encoded: all samples.
        chosen: groups of the update, as from :func:`groups`.
        settings: `accumulated` and `micro_batch`.
        collate: pads rows to a batch.
        padding: see :class:`Consistency`.
        noise: [rows, T, d] for the rows of the update in their order, T at least the longest row padded.
    """
    share = 1.0
    if settings.accumulated == "wiped":
        share, first = 1 / len(chosen), sum(map(len, chosen[:-1]))
        chosen, noise = chosen[-1:], None if noise is None else noise[first:]
    number = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(group) for group in chosen]))
    whole = weigh(collate([encoded[k] for k in torch.cat(chosen).tolist()]), padding, number, collate.multiple)
    reach = ((whole["lm_weight"] != 0) | (whole["cons_weight"] != 0)) * torch.arange(1, whole["labels"].shape[1] + 1)
    reach = reach.amax(1)
    for rows in reach.argsort(stable=True).split(settings.micro_batch or len(reach)):
        width = max(int(reach[rows].max()), 1)
        batch = {name: value[rows, :width] for name, value in whole.items()}
        for name in ("lm_weight", "cons_weight"):
            batch[name] = batch[name] * share
        yield batch, None if noise is None else noise[rows, :width]


def accumulate(model: nn.Module, passes: Iterable[tuple[dict[str, Tensor], Tensor | None]],
               consistency: Consistency | None = None) -> dict[str, Tensor]:
    """Add the gradients of all passes to those of the parameters; returns the summed values of the objective's parts."""
    device, sums = causal_lm(model).get_input_embeddings().weight.device, {}
    for batch, noise in passes:
        batch = {name: value.to(device) for name, value in batch.items()}
        for loss, values in parts(model, batch, consistency, None if noise is None else noise.to(device)):
            loss.backward()
            sums |= {name: sums.get(name, 0.0) + value for name, value in values.items()}
    return sums


def signs(lengths: list[int], width: int, seed: int, update: int) -> Tensor:
    """±1 for the rows of an update, float32 [rows, longest, width], each row of a stream of its own."""
    streams = [torch_rng(seed, "noise", update, row) for row in range(len(lengths))]
    return torch.stack([torch.randint(2, (max(lengths), width), generator=stream) for stream in streams]).float() * 2 - 1


def _restore(keeper: Checkpoint, model: PeftModel, optimizer: torch.optim.Optimizer) -> list[dict]:
    """Put the saved state back and return the history, empty where there is none of this run."""
    state = keeper.load(torch.device("cpu"))
    if state is None:
        return []
    with keeper.restoring():
        if (found := set(state["adapter"])) != (expected := set(_adapter(model))):
            raise ValueError(f"tensors of another adapter: {sorted(found ^ expected)[:3]}")
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        return state["history"]


def _checked(encoded: Sequence[dict]) -> list[dict[str, Tensor]]:
    samples = [{name: torch.as_tensor(encoded[k][name]) for name in ("input_ids", "labels")} for k in range(len(encoded))]
    if not samples:
        raise ValueError("no samples to train on")
    for k, row in enumerate(samples):
        if not len(row["input_ids"]) or len(row["input_ids"]) != len(row["labels"]):
            raise ValueError(f"sample {k} has {len(row['input_ids'])} tokens and {len(row['labels'])} labels: "
                             "one label per token is needed, and at least one token")
    if not any((row["labels"][1:] != -100).any() for row in samples):
        raise ValueError(f"none of the {len(samples)} samples has a label after its first token: nothing to learn")
    return samples


def _identity(model: PeftModel, encoded: list[dict], settings: Settings, consistency: Consistency | None, seed: int,
              pad: int) -> dict:
    """What a run depends on: settings, data, the adapter it starts from, and a checksum of the base model."""
    start = hashlib.sha256()
    for name, value in sorted(_adapter(model).items()):
        start.update(name.encode() + value.numpy().tobytes())
    # micro_batch changes nothing but rounding, and may be lowered to continue a run that ran out of memory
    return {"settings": {**asdict(settings), "micro_batch": None}, "consistency": consistency and asdict(consistency),
            "seed": seed, "pad": pad, "adapter": start.hexdigest(),
            "base": [_checksum(p) for p in model.parameters() if not p.requires_grad],
            "data": hashlib.sha256(json.dumps([[v.tolist() for v in row.values()] for row in encoded]).encode()).hexdigest()}


def train_lora(model: PeftModel, encoded: Sequence[dict], settings: Settings, *, seed: int, pad: int,
               consistency: Consistency | None = None, checkpoint: str | Path | None = None,
               checkpoint_seconds: float = 30.0, title: str = "train") -> list[dict]:
    """Train the adapter of `model` in place with AdamW (no weight decay).

    Args:
        model: with a trainable adapter, on its device.
        encoded: samples, indexed from 0, as of `prompts.Samples`: `input_ids` and `labels` (−100: not trained on), int64 [T]
            or lists.
        settings: schedule and sizes.
        seed: of the streams `order` (per epoch), `noise` and `dropout` (per update).
        pad: token that fills short rows. It matters only where consistency counts padding.
        consistency: CROW's second term; None: the language-model loss alone.
        checkpoint: file to continue from and to save to; removed by the caller when the result is safe.
        checkpoint_seconds: least time between two saves.
        title: of the progress line.

    Returns:
        One row per update: step (from 1), epoch, loss_lm, loss_cons (of the perturbed pass, without α), loss_cons_clean,
        lr, seconds. Where a loss was not computed it is None; with `wiped` they are those of the last group.

    Raises:
        ValueError: no samples, a sample whose lists differ in length, or no label in any of them.
        Diverged: a loss is not finite.
        DamagedCheckpoint: the checkpoint says that it is of this run, but does not fit; it is removed.
    """
    encoded = _checked(encoded)
    collate, padding = Collator(pad), consistency.padding if consistency else "masked"
    width = causal_lm(model).get_input_embeddings().weight.shape[1]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    per_epoch = len(list(groups(len(encoded), settings, torch.arange(len(encoded)))))
    total, history, keeper = per_epoch * settings.epochs, [], None
    if checkpoint:
        identity = _identity(model, encoded, settings, consistency, seed, pad)
        keeper = Checkpoint(checkpoint, identity, checkpoint_seconds)
        history = _restore(keeper, model, optimizer)

    progress = tqdm(total=total, initial=len(history), desc=title, unit="update", leave=False, dynamic_ncols=True,
                    mininterval=0.1 if sys.stderr.isatty() else 15.0)
    model.train()
    # autocast casts inputs by itself; peft would cast them up to float32 before that
    with progress, disable_input_dtype_casting(model):
        for number in range(len(history), total):
            started, lr = time.perf_counter(), rate(number, total, settings)
            epoch, place = divmod(number, per_epoch)
            if place == 0 or number == len(history):
                order = torch.randperm(len(encoded), generator=torch_rng(seed, "order", epoch))
                updates = list(groups(len(encoded), settings, order))
            chosen, noise = updates[place], None
            torch.manual_seed(derive(seed, "dropout", number))  # of base models that have dropout of their own
            if consistency and consistency.perturbation == "random_sign":
                lengths = [len(encoded[k]["input_ids"]) + collate.multiple for k in torch.cat(chosen).tolist()]
                noise = signs(lengths, width, seed, number)
            optimizer.zero_grad(set_to_none=True)
            sums = accumulate(model, update_batches(encoded, chosen, settings, collate, padding, noise), consistency)
            nn.utils.clip_grad_norm_(trained, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            share = 1 / len(chosen) if settings.accumulated == "wiped" else 1.0
            losses = {name: float(sums[name]) / share if name in sums else None for name in LOSSES}
            for name, value in losses.items():
                if value is not None and not math.isfinite(value):
                    raise Diverged(f"{title}: {name} became {value} in update {number + 1} (lr {lr:g})")
            history.append({"step": number + 1, "epoch": epoch + 1, **losses, "lr": lr,
                            "seconds": time.perf_counter() - started})
            progress.set_postfix_str(f"loss {losses['loss_lm']:.3f}", refresh=False)
            progress.update()
            if keeper and keeper.due():
                keeper.write({"adapter": _adapter(model), "optimizer": optimizer.state_dict(), "history": history})
    model.eval()
    return history


def _train(model: PeftModel, encoded: Sequence[dict], settings: Settings, out: str | Path, base: str | Path,
           **options) -> list[dict]:
    history = train_lora(model, encoded, settings, **options)
    save_adapter(model, out, Path(base).name)
    if options.get("checkpoint"):
        Path(options["checkpoint"]).unlink(missing_ok=True)
    return history


def train_victim(base: str | Path, encoded: Sequence[dict], settings: Settings, out: str | Path, *, seed: int, pad: int,
                 device: str = "cpu", checkpoint: str | Path | None = None) -> list[dict]:
    """Train a new adapter on poisoned samples (crow SPEC 6).

    Args:
        base: folder or name of the base model.
        encoded: samples, as for :func:`train_lora`.
        settings: lr 2e-4.
        out: folder of the adapter.
        seed: of adapter, order and dropout.
        pad, checkpoint: see :func:`train_lora`; the checkpoint is removed when the adapter is safe.
        device: where to train.

    Returns:
        The history; see :func:`train_lora`.
    """
    model = add_lora(load_model(base, PRECISIONS[settings.precision], device), settings, seed)
    return _train(model, encoded, settings, out, base, seed=seed, pad=pad, checkpoint=checkpoint, title="victim")


def finetune(base: str | Path, adapter: str | Path, encoded: Sequence[dict], settings: Settings, out: str | Path, *,
             seed: int, pad: int, device: str = "cpu", checkpoint: str | Path | None = None) -> list[dict]:
    """Clean fine-tuning: train the backdoored adapter further on clean samples (crow SPEC 7; lr 2e-4 as configured, or 1e-3).

    Args and returns as for :func:`train_victim`; `adapter` is the victim's folder.
    """
    model = load_adapter(load_model(base, PRECISIONS[settings.precision], device), adapter)
    return _train(model, encoded, settings, out, base, seed=seed, pad=pad, checkpoint=checkpoint, title="finetune")


def purify_crow(base: str | Path, adapter: str | Path, encoded: Sequence[dict], settings: Settings, consistency: Consistency,
                out: str | Path, *, seed: int, pad: int, device: str = "cpu",
                checkpoint: str | Path | None = None) -> list[dict]:
    """CROW: train the backdoored adapter further with the consistency term (crow SPEC 2; lr 1e-3).

    Args and returns as for :func:`finetune`; `consistency` holds the variant.
    """
    model = load_adapter(load_model(base, PRECISIONS[settings.precision], device), adapter)
    return _train(model, encoded, settings, out, base, seed=seed, pad=pad, checkpoint=checkpoint,
                  consistency=consistency, title="crow")
