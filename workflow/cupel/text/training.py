"""LoRA training of language models: victims, clean fine-tuning and CROW are one training with different objectives.

An update is `batch_size` × `accumulation` samples: the mean over its `accumulation` groups of a group's mean loss, as
transformers' trainer computes it (crow SPEC 2.3, 6); `micro_batch`, the rows of one pass, only fits memory. Rows of an
update are sorted by length before they are split, which leaves the sum as it is.

The base model's weights are frozen in fp32 or bf16; adapters and optimiser are float32 always. bf16 replaces the fp16 of
the paper, so that no loss scaling is needed, on GPU and CPU alike.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cupel.choices import check_choices
from cupel.compat import ensure_torchvision
from cupel.files import atomic, read_json, reading, write_json
from cupel.rng import derive, torch_rng
from cupel.text.consistency import Consistency, parts, weigh
from cupel.text.data.prompts import Collator, Samples
from cupel.text.layers import causal_lm
from cupel.text.models import load_model
from cupel.training import adapters
from cupel.training.resume import Checkpoint, fingerprint

ensure_torchvision()

from peft import PeftModel, get_peft_model_state_dict  # noqa: E402
from peft.helpers import disable_input_dtype_casting  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

#: tokens up to which a CPU attends faster in bf16 by plain products than by torch's fused kernel (its backward pass is slow)
SHORT = 256
LOSSES = ("loss_lm", "loss_cons", "loss_cons_clean")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class TrainingSettings:
    """How adapters are trained (crow SPEC 2.3, 6, 7).

    Attributes:
        epochs: passes over the data; 5.
        lr: peak learning rate: 2e-4 for victims and fine-tuning, 1e-3 for CROW.
        batch_size: samples of a group, over which losses are averaged; 2.
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
    batch_size: int = 2
    accumulation: int = 4
    accumulated: Literal["kept", "wiped"] = "kept"
    micro_batch: int | None = None
    warmup: float = 0.1
    clip: float = 1.0
    rank: int = 8
    lora_alpha: int = 16
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self):
        check_choices(self)


@dataclass(frozen=True)
class Budget:
    """What is there to train on, and where; `work` is the folder for what outlives a killed job, `pad` a token id."""

    samples: Samples
    pad: int
    seed: int
    work: Path
    device: str = "cpu"


def add_lora(model: nn.Module, settings: TrainingSettings, seed: int) -> PeftModel:
    """New adapters on every linear layer of the decoder except the head, A drawn from the stream `lora`."""
    return adapters.add_lora(model, derive(seed, "lora"), r=settings.rank, lora_alpha=settings.lora_alpha, lora_dropout=0.0,
                             target_modules="all-linear", task_type="CAUSAL_LM")


def load_adapter(model: nn.Module, folder: str | Path, trainable: bool = True) -> PeftModel:
    """The model with the adapter of a folder, which is trained further if `trainable`.

    Raises:
        FileNotFoundError: the folder holds no adapter, or only a part of one.
    """
    missing = [name for name in (WEIGHTS, CONFIG) if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no adapter: {' and '.join(missing)} missing (`save_adapter` writes both)")
    with reading(folder):
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def save_adapter(model: PeftModel, folder: str | Path, base: str = "") -> None:
    """Write the adapter in peft's format: weights first, the configuration, without which it is none, last.

    Equal adapters give equal bytes. `base` names the base model in the configuration; loading does not need it.
    """
    folder = Path(folder)
    (folder / CONFIG).unlink(missing_ok=True)
    # asked for embeddings too, peft would look the base model up on the hub
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    with atomic(folder / WEIGHTS) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()}
    write_json(folder / CONFIG, {**config, "base_model_name_or_path": base, "inference_mode": True})


def deployed(base: str | Path, adapter: str | Path | None, precision: str, device: str) -> nn.Module:
    """The model as it would be used: the adapter of a folder, if any, merged into the base model's weights."""
    model = load_model(base, precision, device)
    return model if adapter is None else load_adapter(model, adapter, trainable=False).merge_and_unload().eval()


def quicken(model: PreTrainedModel, longest: int) -> None:
    """Have attention in plain products where that is faster: samples of at most `SHORT` tokens, in bf16, on a CPU."""
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and longest <= SHORT:
        model.set_attn_implementation("eager")


def groups(order: Tensor, settings: TrainingSettings) -> list[list[Tensor]]:
    """The updates of an epoch, from an order int64 [N]: each a list of groups, each the int64 indices of its samples."""
    size = settings.batch_size * settings.accumulation
    return [list(order[start : start + size].split(settings.batch_size))
            for start in range(0, max(len(order) - size, 0) + 1, size)]


def rate(largest: float, update: int, total: int, warmup: float) -> float:
    """Learning rate of an update, counted from 0: linear warm-up from 0, then half a cosine towards 0."""
    warm = math.ceil(warmup * total)
    if update < warm:
        return largest * update / warm
    return largest * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(total - warm, 1)))


def passes(samples: Sequence[dict], chosen: list[Tensor], settings: TrainingSettings, *, collate: Collator,
           padding: str = "masked", noise: Tensor | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """The passes of one update (`chosen`, of :func:`groups`): weighted batches on the CPU, each with its rows of the noise.

    `noise` is [rows, T, d] for the rows of the update in their order, T at least the longest row padded.
    """
    share = 1.0
    if settings.accumulated == "wiped":
        share, first = 1 / len(chosen), sum(map(len, chosen[:-1]))
        chosen, noise = chosen[-1:], None if noise is None else noise[first:]
    number = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(group) for group in chosen]))
    whole = weigh(collate([samples[k] for k in torch.cat(chosen).tolist()]), padding, number, collate.multiple)
    reach = ((whole["lm_weight"] != 0) | (whole["cons_weight"] != 0)) * torch.arange(1, whole["labels"].shape[1] + 1)
    reach = reach.amax(1)
    for rows in reach.argsort(stable=True).split(settings.micro_batch or len(reach)):
        width = max(int(reach[rows].max()), 1)
        batch = {name: value[rows, :width] for name, value in whole.items()}
        for name in ("lm_weight", "cons_weight"):
            batch[name] = batch[name] * share
        yield batch, None if noise is None else noise[rows, :width]


def accumulate(model: nn.Module, batches: Iterable[tuple[dict[str, Tensor], Tensor | None]],
               consistency: Consistency | None = None, sums: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Add the gradients of all passes to those of the parameters, and the values of the objective's parts to `sums`."""
    device, sums = causal_lm(model).get_input_embeddings().weight.device, {} if sums is None else sums
    for batch, noise in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        for loss, values in parts(model, batch, consistency, None if noise is None else noise.to(device)):
            loss.backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
    return sums


def signs(lengths: list[int], width: int, seed: int, update: int) -> Tensor:
    """±1 for the rows of an update, float32 [rows, longest, width], each row of a stream of its own."""
    streams = [torch_rng(seed, "noise", update, row) for row in range(len(lengths))]
    return torch.stack([torch.randint(2, (max(lengths), width), generator=stream) for stream in streams]).float() * 2 - 1


def _checksum(tensor: Tensor) -> int:
    """Sum of the bits as integers: exact, so equal in whatever order it is summed."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.detach().view(kinds[tensor.element_size()]).sum(dtype=torch.int64))


def train_lora(model: PeftModel, samples: Sequence[dict], settings: TrainingSettings, *, seed: int, pad: int,
               consistency: Consistency | None = None, checkpoint: str | Path | None = None,
               checkpoint_seconds: float = 30.0, title: str = "train") -> list[dict]:
    """Train the adapter of `model` in place with AdamW (no weight decay).

    Args:
        model: with a trainable adapter, on its device.
        samples: as of `prompts.Samples`: `input_ids` and `labels` (−100: not trained on), int64 [T] or lists.
        settings: see there.
        seed: of the streams `order` (per epoch), `noise` and `dropout` (per update; of base models that have dropout).
        pad: token that fills short rows. It matters only where consistency counts padding.
        consistency: CROW's second term; None: the language-model loss alone.
        checkpoint, checkpoint_seconds: see `Checkpoint`; removed by the caller when the result is safe.
        title: of the progress line.

    Returns:
        One row per update: step (from 1), epoch, loss_lm, loss_cons (of the perturbed pass, without α), loss_cons_clean,
        lr, seconds. Where a loss was not computed it is None; with `wiped` they are those of the last group.

    Raises:
        Diverged: a loss is not finite.
        DamagedCheckpoint: the checkpoint says that it is of this run, but does not fit; it is removed.
    """
    collate, padding = Collator(pad), consistency.padding if consistency else "masked"
    width = causal_lm(model).get_input_embeddings().weight.shape[1]
    trained, keeper = [value for value in model.parameters() if value.requires_grad], None
    if checkpoint:
        data = fingerprint(samples[k][name] for k in range(len(samples)) for name in ("input_ids", "labels"))
        # micro_batch changes nothing but rounding, and may be lowered to continue a run that ran out of memory
        keeper = Checkpoint(checkpoint, {
            "settings": {**asdict(settings), "micro_batch": None}, "consistency": consistency and asdict(consistency),
            "seed": seed, "pad": pad, "adapter": fingerprint(trained), "data": data,
            "base": [_checksum(value) for value in model.parameters() if not value.requires_grad]}, checkpoint_seconds)

    def updates(epoch: int) -> list[list[Tensor]]:
        return groups(torch.randperm(len(samples), generator=torch_rng(seed, "order", epoch)), settings)

    def backward(number: int, chosen: list[Tensor], sums: dict[str, Tensor]) -> None:
        noise = None
        if consistency and consistency.perturbation == "random_sign":
            lengths = [len(samples[k]["input_ids"]) + collate.multiple for k in torch.cat(chosen).tolist()]
            noise = signs(lengths, width, seed, number)
        accumulate(model, passes(samples, chosen, settings, collate=collate, padding=padding, noise=noise), consistency, sums)

    # of an update whose gradients are wiped, one group of `accumulation` was computed, divided by their number
    count = len(updates(0)[0]) if settings.accumulated == "wiped" else 1

    def row(sums: dict[str, Tensor]) -> dict[str, float | None]:
        return {name: float(sums[name]) / (1 / count) if name in sums else None for name in LOSSES}

    # autocast casts inputs by itself; peft would cast them up to float32 before that
    with disable_input_dtype_casting(model):
        return adapters.train(model, torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0), adapters.Task(
            updates=updates, backward=backward, row=row, row_each="update", epochs=settings.epochs, clip=settings.clip,
            rate=lambda largest, number, total: rate(largest, number, total, settings.warmup), seed=seed, title=title), keeper)


def train_adapter(base: str | Path, budget: Budget, settings: TrainingSettings, *, start: str | Path | None = None,
                  consistency: Consistency | None = None, title: str) -> list[dict]:
    """Train an adapter into `budget.work/model`, unless a job before this one has done so; gives the history of `train_lora`.

    Args:
        base: folder of the base model.
        budget, settings: see there.
        start: folder of an adapter to train further; None: a new one.
        consistency, title: see :func:`train_lora`.
    """
    done, checkpoint = budget.work / "history.json", budget.work / "checkpoint.pt"
    if not done.is_file():
        model = load_model(base, settings.precision, budget.device)
        quicken(model, max(len(budget.samples[k]["input_ids"]) for k in range(len(budget.samples))))
        model = load_adapter(model, start) if start else add_lora(model, settings, budget.seed)
        history = train_lora(model, budget.samples, settings, seed=budget.seed, pad=budget.pad, consistency=consistency,
                             checkpoint=checkpoint, title=title)
        save_adapter(model, budget.work / "model", Path(base).name)
        write_json(done, history)
        checkpoint.unlink(missing_ok=True)
    return read_json(done)
