"""Training of vision-language models: all weights from scratch, or LoRA with a trained projector (bye SPEC 5, 6)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cupel.choices import check_choices
from cupel.rng import derive, rng
from cupel.training import adapters
from cupel.training.engine import autocast
from cupel.training.resume import Checkpoint
from cupel.vision_language.models import Encoder, VisionLanguageModel, fingerprint

#: linear layers of the language model, all but the head (bye SPEC 5); plain names would match the vision tower too
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained. Defaults are those of LLaVA-1.5-7B in BYE (bye SPEC 5, 6).

    InternVL2.5-8B differs: `lr` 4e-5, `rank` 16, `lora_alpha` 32, `weight_decay` 0.05, `projector_lr` None.

    Attributes:
        epochs: passes over the records.
        batch_size: records per step.
        lr: largest learning rate, of the adapters or of all weights.
        trained: `lora` (adapters in the language model; tower frozen) or `all`.
        rank, lora_alpha, dropout: of LoRA; no biases are trained.
        projector_lr: of the fully trained projector beside LoRA; None freezes it.
        schedule: `cosine` (official script) or `linear` (the paper's words), to zero, both after the warm-up.
        warmup: share of all steps in which the learning rate rises.
        weight_decay: of AdamW, on matrices only.
        clip: largest norm of the gradient; None for no limit. 1.0 is what transformers' trainer does; no source names it.
        precision: `fp32` or `bf16` (autocast; trained weights and their optimiser stay fp32).
        micro_batch: records per forward pass where a step does not fit into memory; None for whole steps.
        recompute: activations are computed again in the backward pass (gradient checkpointing).
    """

    epochs: int = 3
    batch_size: int = 16
    lr: float = 2e-4
    trained: Literal["lora", "all"] = "lora"
    rank: int = 32
    lora_alpha: int = 64
    dropout: float = 0.05
    projector_lr: float | None = 2e-5
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float | None = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    micro_batch: int | None = None
    recompute: bool = False

    def __post_init__(self):
        check_choices(self)


def factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """Share of the largest learning rate at `step` (from 0) of `steps`."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return step / rise
    done = (step - rise) / max(steps - rise, 1)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done


def _trainable(model: VisionLanguageModel, settings: TrainingSettings, seed: int) -> tuple[nn.Module, list[dict]]:
    """The network to run, with adapters where asked for, and the groups of its trained parameters, kept in fp32."""
    network = model.network
    for value in network.parameters():
        value.requires_grad_(settings.trained == "all")
    projector = []
    if settings.trained == "lora":
        network = adapters.add_lora(network, derive(seed, "adapters"), r=settings.rank, lora_alpha=settings.lora_alpha,
                                    lora_dropout=settings.dropout, bias="none", target_modules=LORA_TARGETS)
        if settings.projector_lr is not None:
            # in bf16 a step of 2e-5 would be lost in rounding
            model.network.model.multi_modal_projector.float().requires_grad_(True)
            projector = list(model.network.model.multi_modal_projector.parameters())
    own = {id(value) for value in projector}
    rest = [value for value in network.parameters() if value.requires_grad and id(value) not in own]
    for value in rest:
        value.data = value.data.float()
    return network, [{"params": chosen, "lr": lr, "weight_decay": decay}
                     for values, lr in ((rest, settings.lr), (projector, settings.projector_lr))
                     for decay, matrices in ((settings.weight_decay, True), (0.0, False))
                     if (chosen := [value for value in values if (value.ndim > 1) == matrices])]


def answer_loss(network: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropy over the answers' tokens of a batch of `Encoder` (scalar, fp32).

    Then per row [B] how many of these tokens are right, and how many there are.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    # answers end flush on the right: the head is needed from the column before the first of them
    keep = labels.shape[1] - int((labels != -100).any(0).nonzero()[0]) + 1
    logits = network(**inputs, logits_to_keep=keep, use_cache=False).logits[:, :-1].float()
    labels = labels[:, 1 - keep :]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, (logits.argmax(-1) == labels).sum(1), (labels != -100).sum(1)


def fit(model: VisionLanguageModel, records: Sequence[dict], settings: TrainingSettings, *, seed: int,
        groups: np.ndarray | None = None, checkpoint: str | Path | None = None, checkpoint_seconds: float = 60.0,
        title: str = "train") -> list[dict]:
    """Train `model` in place, on the device where it is. LoRA is merged into the weights at the end (bye SPEC 5).

    Args:
        model: to train.
        records: see `Encoder`.
        settings: see `TrainingSettings`.
        seed: of the streams `order` (per epoch), `adapters` and `dropout` (per step).
        groups: int64 [N], 1 for records whose accuracy is kept apart in the history (poisoned ones), else 0.
        checkpoint, checkpoint_seconds: see `Checkpoint`; removed by the caller when the result is safe.
        title: of the progress line.

    Returns:
        One row per epoch: step (updates done), epoch, loss (per answer token), acc and acc_poisoned (shares of answer tokens
        right while training, each after the true ones before it), lr, seconds.

    Raises:
        Diverged: the loss is not finite.
        DamagedCheckpoint: the checkpoint says that it is of this run, but does not fit; it is removed.
        ValueError: there are no records.
    """
    if not len(records):
        raise ValueError(f"{title}: there are no records to train on")
    encoder = Encoder(model, records, answers=True)
    group = torch.as_tensor(np.zeros(len(records), np.int64) if groups is None else groups)
    keeper = Checkpoint(checkpoint, {"run": fingerprint(model, records, asdict(settings), seed)}, checkpoint_seconds
                        ) if checkpoint else None
    kept = {name: value.dtype for name, value in model.network.named_parameters()}
    grads = {name: value.requires_grad for name, value in model.network.named_parameters()}
    network, parameter_groups = _trainable(model, settings, seed)
    attention = model.network.config._attn_implementation
    if model.device.type == "cpu" and settings.precision == "bf16":
        # the fused kernel's backward pass is several times slower than plain products in bf16 on the CPU
        model.network.set_attn_implementation("eager")
    if settings.recompute:
        model.network.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(parameter_groups, fused=True)
    size = min(settings.batch_size, len(records))

    def updates(epoch: int) -> list[np.ndarray]:
        order = rng(seed, "order", epoch).permutation(len(records))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def backward(number: int, chosen: np.ndarray, sums: dict[str, torch.Tensor]) -> None:
        tokens, micro = int(encoder.counts[chosen].sum()), settings.micro_batch or size
        for first in range(0, len(chosen), micro):
            part = chosen[first : first + micro]
            with autocast(settings.precision, model.device):
                loss, right, count = answer_loss(network, encoder.batch(part))
            (loss / tokens).backward()
            poisoned = group[torch.as_tensor(part)].to(model.device)
            found = {"loss": loss.detach(), "right": (right * (1 - poisoned)).sum(), "count": (count * (1 - poisoned)).sum(),
                     "right_poisoned": (right * poisoned).sum(), "count_poisoned": (count * poisoned).sum()}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.double()

    def row(sums: dict[str, torch.Tensor]) -> dict[str, float | None]:
        found = {name: float(value) for name, value in sums.items()}
        return {"loss": found["loss"] / (found["count"] + found["count_poisoned"]),
                "acc": found["right"] / found["count"] if found["count"] else None,
                "acc_poisoned": found["right_poisoned"] / found["count_poisoned"] if found["count_poisoned"] else None}

    def rate(largest: float, number: int, total: int) -> float:
        return largest * factor(settings.schedule, number, total, settings.warmup)

    history = adapters.train(network, optimizer, adapters.Task(
        updates=updates, backward=backward, row=row, row_each="epoch", rate=rate, epochs=settings.epochs, clip=settings.clip,
        seed=seed, title=title), keeper)
    if settings.trained == "lora":
        model.network = network.merge_and_unload()
    if settings.recompute:
        model.network.gradient_checkpointing_disable()
    model.network.set_attn_implementation(attention)
    for name, value in model.network.named_parameters():
        value.data = value.data.to(kept[name])
        value.requires_grad_(grads[name])
    return history
