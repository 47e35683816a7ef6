"""Three small trainings, one by each loop of the library, for what is done to them and to their checkpoints.

An epoch is two steps in each. `python -m tests.faults.trainings <kind> <folder>` runs one in `folder` with a checkpoint
whenever there can be one, and says so while it goes.
"""

import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from cupel.compat import ensure_torchvision

ensure_torchvision()

DRAW = np.random.default_rng(0)
IMAGES, LABELS = DRAW.integers(0, 256, (64, 16, 16, 3), np.uint8), np.arange(64) % 10
PICTURES = [{"id": str(k), "image": DRAW.integers(0, 256, (32, 32, 3), np.uint8), "question": "what is it?",
             "answer": ("yes", "no")[k % 2]} for k in range(8)]
TEXTS = [torch.from_numpy(DRAW.integers(3, 97, length)) for length in range(8, 24)]


def image(path: Path | None, epochs: int, step: Callable) -> dict[str, torch.Tensor]:
    """A small ResNet by `training.engine.fit`."""
    from cupel.images import models
    from cupel.training.engine import Recipe, fit

    model = models.build("preactresnet18", num_classes=10, image_size=16, seed=0, width=8)
    fit(model, IMAGES, LABELS, Recipe(epochs=epochs, lr=0.05, batch_size=32, crop=2), seed=1, checkpoint=path,
        checkpoint_seconds=0, after_step=lambda _: step())
    return model.state_dict()


def _stepping(step: Callable) -> AbstractContextManager:
    """`step` is called in the middle of each update: where gradients are clipped."""
    clip = torch.nn.utils.clip_grad_norm_
    return mock.patch.object(torch.nn.utils, "clip_grad_norm_", lambda *arguments: (step(), clip(*arguments))[1])


def language(path: Path | None, epochs: int, step: Callable) -> dict[str, torch.Tensor]:
    """Adapters of a small Llama by `text.training.train_lora`, with CROW's objective."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cupel.text.consistency import Consistency
    from cupel.text.training import TrainingSettings, add_lora, train_lora

    torch.manual_seed(0)
    settings = TrainingSettings(precision="fp32", epochs=epochs, lr=1e-2)
    model = add_lora(LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128)), settings, seed=0)
    rows = [{"input_ids": text, "labels": text} for text in TEXTS]
    with _stepping(step):
        train_lora(model, rows, settings, seed=1, pad=0, consistency=Consistency(perturbation="random_sign"), checkpoint=path,
                   checkpoint_seconds=0)
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def pictures(path: Path | None, epochs: int, step: Callable) -> dict[str, torch.Tensor]:
    """Adapters and projector of a small LLaVA by `vision_language.training.fit`."""
    from cupel.vision_language.models import tiny_llava
    from cupel.vision_language.training import TrainingSettings, fit

    model = tiny_llava(["what is it?", "yes", "no"], image_size=32, patch_size=8, vision_width=32, vision_layers=2,
                       vision_heads=2, width=48, layers=3, heads=4, kv_heads=2, initial=0.02, seed=3)
    settings = TrainingSettings(epochs=epochs, batch_size=4, lr=1e-2, rank=4, lora_alpha=8, projector_lr=1e-3, precision="fp32",
                                dropout=0.1)
    with _stepping(step):
        fit(model, PICTURES, settings, seed=1, checkpoint=path, checkpoint_seconds=0)
    return model.network.state_dict()


@dataclass(frozen=True)
class Training:
    """What is known of a training.

    Attributes:
        what: as said in the table.
        run: path of the checkpoint, epochs, and what is called in every step, to the weights.
        weights: key of its checkpoint for tensors of the network.
        done: epochs or updates that a checkpoint counts.
        per_epoch: how many of those are an epoch.
    """

    what: str
    run: Callable
    weights: str
    done: Callable[[dict], int]
    per_epoch: int


TRAININGS = {
    "image": Training("a training", image, "model", lambda state: state["epoch"], 1),
    "language": Training("a training of a language model", language, "weights", lambda state: state["step"], 2),
    "pictures": Training("a training of a vision-language model", pictures, "weights", lambda state: state["step"], 2),
}


def train(kind: str, path: Path | None = None, steps: int | None = None) -> dict[str, torch.Tensor]:
    """Weights after three epochs of two steps, with what stands at `path` continued; KeyboardInterrupt after `steps`."""
    left = iter(range(steps)) if steps else None

    def step():
        if left is not None and next(left, None) is None:
            raise KeyboardInterrupt

    return TRAININGS[kind].run(path, 3, step)


def saved(kind: str, folder: Path) -> int:
    """Epochs or updates in the checkpoint."""
    path = folder / "checkpoint.pt"
    return TRAININGS[kind].done(torch.load(path, weights_only=True)) if path.is_file() else 0


EPOCHS = 24


def main(kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    every, number = 2 // TRAININGS[kind].per_epoch, itertools.count(1)

    def step():
        if next(number) % every == 0:
            print("done", flush=True)

    TRAININGS[kind].run(None, 1, lambda: None)  # imports and first calls take their time before, not within
    print("begin", flush=True)
    weights = TRAININGS[kind].run(Path(folder) / "checkpoint.pt", EPOCHS, step)
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    save_file(weights, Path(folder) / "model.safetensors")
    print("end", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
