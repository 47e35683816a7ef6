"""The training engine: victims, tuning defences and robust training all run through `fit`.

Data live on the device as uint8; order and augmentation of an epoch are drawn at its start from streams named by the
epoch's number, so a run continued from a checkpoint sees the very same batches, and on the CPU ends with the same bits.
"""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from cupel.rng import derive, torch_rng
from cupel.training.augment import Draws, augment, to_pixels
from cupel.training.hook import Hook
from cupel.training.progress import Progress
from cupel.training.resume import EVERY, Checkpoint, Resume, Training

Objective = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Diverged(ArithmeticError):
    """A loss, a weight or an output is no longer finite."""


def require_finite(values: Iterable[torch.Tensor], what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        Diverged: there is one; whoever went on would count NaN as class 0, which is where `argmax` puts it.
    """
    if not all(value.isfinite().all() for value in values if value.is_floating_point()):
        raise Diverged(f"{what} are not all finite numbers: the training diverged, or a method computed NaN")


@contextlib.contextmanager
def finite_outputs(network: nn.Module) -> Iterator[None]:
    """In here a network whose logits are not finite is refused, whoever calls it; of a sequence the last position counts,
    which is where an answer goes on.

    Raises:
        Diverged: see `require_finite`.
    """
    def look(module, given, output):
        logits = getattr(output, "logits", output).detach()
        require_finite([logits[:, -1] if logits.ndim == 3 else logits], "outputs")

    with network.register_forward_hook(look):
        yield


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the data.
        lr: learning rate (the largest one, for `onecycle`).
        batch_size: samples per step.
        optimizer: `sgd`, `adam` or `adamw`.
        momentum, nesterov: of SGD.
        weight_decay: of the optimiser.
        schedule: `constant`, `cosine`, `multistep`, `plateau` (on the training loss), stepped once per epoch, or
            `onecycle`, stepped per batch.
        t_max: period of the cosine, in epochs; None: the number of epochs.
        lr_min: where the cosine ends.
        milestones, gamma: of `multistep`.
        crop: zero padding of the random crop, in pixels.
        flip: random horizontal flips.
        drop_last: leave out the last partial batch.
        label_smoothing: of the cross-entropy.
        precision: `fp32` or `bf16` (autocast).
        compile: run the network through `torch.compile`.
    """

    epochs: int
    lr: float
    batch_size: int = 128
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    t_max: int | None = None
    lr_min: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    crop: int = 4
    flip: bool = True
    drop_last: bool = False
    label_smoothing: float = 0.0
    precision: str = "fp32"
    compile: bool = False


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain objective."""
    logits = model(x)
    return F.cross_entropy(logits, y, label_smoothing=smoothing), logits


def descend(optimizer: torch.optim.Optimizer, closure: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """One step: loss of `closure`, gradients, update."""
    optimizer.zero_grad(set_to_none=True)
    loss, logits = closure()
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def make_optimizer(parameters: Iterable, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser of a recipe."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay,
                               nesterov=recipe.nesterov)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[recipe.optimizer](parameters, recipe.lr, weight_decay=recipe.weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int):
    """The schedule of a recipe with `steps` batches an epoch."""
    if recipe.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, recipe.t_max or recipe.epochs, recipe.lr_min)
    if recipe.schedule == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=max(recipe.epochs * steps, 2))
    if recipe.schedule == "multistep":
        return lr_scheduler.MultiStepLR(optimizer, list(recipe.milestones), recipe.gamma)
    if recipe.schedule == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer)
    return lr_scheduler.ConstantLR(optimizer, 1.0)


def autocast(precision: str, device: torch.device):
    """Context of a precision: bf16 autocast, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def upload(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [N, H, W, C] on the device, in memory of its own.

    Raises:
        ValueError: images of another type, such as floats in [0, 1], which would be taken for levels of 255.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images are uint8 [N, H, W, C], not {images.dtype} {images.shape}")
    return torch.from_numpy(np.array(images)).to(device)


def cuts(count: int, size: int, drop_last: bool = False) -> list[slice]:
    """Batches of `size` out of `count` samples; what does not fill the last one is kept, or left out with `drop_last`.

    A single sample that would be left joins the batch before it: BatchNorm has no variance of one value.
    """
    ends = list(range(size, count + 1, size))
    if count % size and not drop_last:
        ends[len(ends) - (count % size == 1) :] = [count]
    return [slice(*ends) for ends in pairwise([0, *ends])]


def fit(model: nn.Module, images: np.ndarray | torch.Tensor, labels: np.ndarray | torch.Tensor, recipe: Recipe, *,
        seed: int, device: str | torch.device = "cpu", objective: Objective | None = None, step: Callable = descend,
        after_step: Callable[[nn.Module], None] | None = None, hook: Hook | None = None,
        groups: np.ndarray | None = None, parameters: Iterable[nn.Parameter] | None = None,
        checkpoint: str | Path | Resume | None = None, checkpoint_seconds: float = EVERY, title: str = "train") -> list[dict]:
    """Train `model` in place.

    Args:
        model: takes float pixels [B, C, H, W] in [0, 1], gives logits [B, K].
        images: uint8 [N, H, W, C].
        labels: int64 [N].
        seed: of the streams `order`, `augmentation` and `noise`, each per epoch.
        objective: (model, x, y) to (loss, logits); default cross-entropy.
        step: (optimizer, closure) to (loss, logits); default one gradient step. Sharpness-aware steps replace it.
        after_step: called with the model after each update, e.g. a projection.
        groups: int64 [N], 1 for samples whose accuracy is kept apart in the history (poisoned ones), else 0.
        parameters: those to train; default all. The others keep their values, but the network stays in train mode.
        checkpoint: file to continue from and to save to; removed by the caller when the result is safe. A `Resume`, of
            which this training is a part, has its own time between two saves, others have `checkpoint_seconds`.

    Returns:
        One row per epoch: epoch, loss, accuracy, accuracy of group 1, lr, seconds. Accuracies are those of the
        training batches, as fractions.

    Raises:
        Diverged: the loss of an epoch, or a weight at the end, is not finite.
        DamagedCheckpoint: the checkpoint says that it is of this run, but does not fit; it is removed.
        ValueError: fewer samples than one batch although the recipe drops partial batches.
    """
    device = torch.device(device)
    model.to(device, memory_format=torch.channels_last).train()
    data = images if torch.is_tensor(images) else upload(images, device)
    target = torch.as_tensor(labels, device=device)
    group = torch.as_tensor(groups if groups is not None else np.zeros(len(target), np.int64), device=device)
    objective = objective or functools.partial(cross_entropy, smoothing=recipe.label_smoothing)
    hook = hook or Hook()
    trained = list(parameters if parameters is not None else model.parameters())
    optimizer = make_optimizer(trained, recipe)
    parts = cuts(len(target), recipe.batch_size, recipe.drop_last)
    if recipe.drop_last and len(target) < recipe.batch_size:
        raise ValueError(f"{len(target)} samples do not fill one batch of {recipe.batch_size}, and drop_last is on")
    scheduler = make_scheduler(optimizer, recipe, len(parts))
    run = torch.compile(model) if recipe.compile else model

    identity = {"recipe": asdict(recipe), "seed": seed, "title": title, "device": device.type, "samples": len(target),
                "labels": hashlib.sha256(target.cpu().numpy().tobytes()).hexdigest(),
                "pixels": int(data.sum(dtype=torch.int64))}
    if isinstance(checkpoint, Resume):
        keeper = Training(checkpoint, model, identity)
    else:
        keeper = Checkpoint(checkpoint, identity, checkpoint_seconds) if checkpoint else None
    if keeper and keeper.finished is not None:
        model.eval()
        return keeper.finished
    history, begin = [], 0
    if keeper and (state := keeper.load(device)):
        with keeper.restoring():
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            hook.load_state_dict(state["hook"])
            history, begin = state["history"], state["epoch"]
    else:
        hook.start(model, data, target)

    frozen = [(p, p.requires_grad) for p in model.parameters()]
    keep = {id(p) for p in trained}
    for p, _ in frozen:
        p.requires_grad_(id(p) in keep)
    progress = Progress(title, recipe.epochs * parts[-1].stop, begin * parts[-1].stop)
    for number in range(begin, recipe.epochs):
        started = time.perf_counter()
        order = torch.randperm(len(target), generator=torch_rng(seed, "order", number)).to(device)
        draws = Draws.draw(len(target), recipe.crop, recipe.flip, torch_rng(seed, "augmentation", number), device)
        noise = torch_rng(seed, "noise", number)
        torch.manual_seed(derive(seed, "dropout", number))
        hook.epoch(number)
        lr = optimizer.param_groups[0]["lr"]
        # sums stay on the device: reading them every step would make the device wait for the host
        total = torch.zeros(5, device=device, dtype=torch.float64)
        for part in parts:
            index = order[part]
            x, y, g = to_pixels(data[index]), target[index], group[index]

            def change(batch, index=index, draws=draws):
                return augment(batch, recipe.crop, draws.flip[index], draws.shift[index])

            hook.groups = g
            x, y, found = hook.batch(x, y, change, noise)
            g = g if found is None else found

            def closure(x=x, y=y):
                with autocast(recipe.precision, device):
                    loss, logits = objective(run, x, y)
                    extra = hook.loss(model, x, y, logits)
                return loss if extra is None else loss + extra, logits

            loss, logits = step(optimizer, closure)
            if after_step:
                after_step(model)
            hook.after_step()
            if recipe.schedule == "onecycle":
                scheduler.step()
            right = logits.argmax(1) == y
            total += torch.stack([loss.double() * len(y), (right & (g == 0)).sum(), (g == 0).sum(),
                                  (right & (g == 1)).sum(), (g == 1).sum()])
            progress(len(y))
        sums = total.tolist()
        row = {"epoch": number + 1, "loss": sums[0] / max(sums[2] + sums[4], 1), "acc": sums[1] / max(sums[2], 1),
               "acc_poisoned": sums[3] / sums[4] if sums[4] else None, "lr": lr,
               "seconds": time.perf_counter() - started}
        if not np.isfinite(row["loss"]):
            raise Diverged(f"{title}: the loss became {row['loss']} in epoch {number + 1} (lr {lr:g})")
        history.append(row)
        progress(0, f"epoch {number + 1}/{recipe.epochs}, loss {row['loss']:.3f}, accuracy {row['acc']:.3f}")
        if recipe.schedule == "plateau":
            scheduler.step(row["loss"])
        elif recipe.schedule != "onecycle":
            scheduler.step()
        if keeper:
            keeper.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                         "scheduler": scheduler.state_dict(), "hook": hook.state_dict(),
                         "history": history, "epoch": number + 1}, last=number + 1 == recipe.epochs)
    progress.close()
    require_finite([*trained, *model.buffers()], f"{title}: weights after the last step")
    for p, grad in frozen:
        p.requires_grad_(grad)
    model.eval()
    return history


def predict(model: nn.Module, images: np.ndarray, *, device: str | torch.device = "cpu", batch_size: int = 500,
            precision: str = "fp32") -> np.ndarray:
    """Logits float32 [N, K] of uint8 images [N, H, W, C], in eval mode.

    Raises:
        Diverged: a logit is not finite.
        ValueError: the images are not uint8.
    """
    device = torch.device(device)
    # before inference mode, which would turn weights that change their layout into tensors that cannot be trained
    model.to(device, memory_format=torch.channels_last).eval()
    out = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            x = to_pixels(upload(images[start : start + batch_size], device))
            with autocast(precision, device):
                out.append(model(x).float().cpu())
    logits = torch.cat(out)
    require_finite([logits], "outputs")
    return logits.numpy()
