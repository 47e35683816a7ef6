"""The training loop of language and vision-language models, whose adapters (LoRA) are trained, or all weights.

It is written here and is not transformers' `Trainer`: the trainer's checkpoints pickle the optimiser and are folders that
can be half written, and its losses are normalised per forward pass, so that the size of a pass would change the result.
Here an update is defined by its samples alone; how many rows go through the network at once only fits memory.

What an update draws comes from streams named by epoch or update, and a checkpoint holds everything else: a run that was
killed ends on the CPU with the same bits as one that was not.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cupel.compat import ensure_torchvision
from cupel.rng import derive
from cupel.training.engine import Diverged, Progress, require_finite
from cupel.training.resume import Checkpoint, restore

ensure_torchvision()

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402


def add_lora(network: nn.Module, seed: int, **settings) -> PeftModel:
    """New adapters on a network, by settings of peft's `LoraConfig`: B is zero, A drawn from `seed`.

    The generator's own state is left as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(network, LoraConfig(**settings))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a training does; its parts are functions, because families differ in them.

    Attributes:
        updates: the updates of an epoch, counted from 0, each as `backward` takes it. All epochs have as many.
        backward: (number, update, sums): adds the gradients of an update, counted from 0, and its values to `sums`, a
            dict of scalar tensors that is empty after each row of the history.
        row: values of the history, by name, from the sums; the first is the loss that the progress line shows.
        row_each: `update` or `epoch`.
        rate: (largest, number, total): learning rate of an update.
        epochs: passes over the data.
        clip: largest norm of the gradient; None for no limit.
        seed: of the stream `dropout` (per update).
        title: of the progress line.
    """

    updates: Callable[[int], Sequence]
    backward: Callable[[int, Any, dict[str, Tensor]], None]
    row: Callable[[dict[str, Tensor]], dict[str, float | None]]
    row_each: str
    rate: Callable[[float, int, int], float]
    epochs: int
    clip: float | None
    seed: int
    title: str


def train(network: nn.Module, optimizer: torch.optim.Optimizer, task: Task, keeper: Checkpoint | None = None) -> list[dict]:
    """Train what the optimiser holds, in place; the network ends in eval mode.

    Args:
        optimizer: of trained parameters; the rate of each of its groups is the largest one.
        keeper: checkpoint to continue from and to save to; removed by the caller when the result is safe.

    Returns:
        Rows of `task.row`, with step (updates done), epoch (from 1), lr of the first group, seconds since the last row.

    Raises:
        Diverged: a value of a row, or a weight at the end, is not finite.
        DamagedCheckpoint: the checkpoint says that it is of this run, but does not fit; it is removed.
    """
    names = {id(value): name for name, value in network.named_parameters()}
    trained = [value for group in optimizer.param_groups for value in group["params"]]
    weights = {names[id(value)]: value.detach() for value in trained}
    largest = [group["lr"] for group in optimizer.param_groups]
    done, history, sums = 0, [], {}
    if keeper and (state := keeper.load(torch.device("cpu"))):
        with keeper.restoring():
            if other := set(state["weights"]) ^ set(weights):
                raise ValueError(f"weights of another network: {sorted(other)[:3]}")
            for name, value in weights.items():
                restore(value, state["weights"][name])
            optimizer.load_state_dict(state["optimizer"])
            done, history, sums = state["step"], state["history"], state["sums"]
    per_epoch = len(task.updates(0))
    total = per_epoch * task.epochs
    progress = Progress(task.title, total, done, unit="updates")
    network.train()
    started = time.perf_counter()
    for number in range(done, total):
        epoch, place = divmod(number, per_epoch)
        if place == 0 or number == done:
            updates = task.updates(epoch)
        torch.manual_seed(derive(task.seed, "dropout", number))
        task.backward(number, updates[place], sums)
        if task.clip:
            nn.utils.clip_grad_norm_(trained, task.clip)
        for group, top in zip(optimizer.param_groups, largest, strict=True):
            group["lr"] = task.rate(top, number, total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        said = ""
        if task.row_each == "update" or place == per_epoch - 1:
            values, sums = task.row(sums), {}
            for name, value in values.items():
                if value is not None and not math.isfinite(value):
                    raise Diverged(f"{task.title}: {name} became {value} in update {number + 1} (lr {largest[0]:g})")
            history.append({"step": number + 1, "epoch": epoch + 1, **values, "lr": optimizer.param_groups[0]["lr"],
                            "seconds": time.perf_counter() - started})
            started = time.perf_counter()
            said = f"epoch {epoch + 1}/{task.epochs}, loss {next(iter(values.values())):.3f}"
        progress(1, said)
        if keeper:
            keeper.save({"weights": weights, "step": number + 1, "optimizer": optimizer.state_dict(), "history": history,
                         "sums": sums}, last=number + 1 == total)
    progress.close()
    require_finite(trained, f"{task.title}: weights after the last update")
    network.eval()
    return history
