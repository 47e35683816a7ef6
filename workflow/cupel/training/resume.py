"""Checkpoints: the state of a run in one file, whole or absent, from which a killed run goes on to the same end."""

import contextlib
import hashlib
import itertools
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cupel.files import atomic
from cupel.training.progress import Progress

EVERY = 10.0  # least number of seconds between two saves


class DamagedCheckpoint(RuntimeError):
    """A checkpoint claims to be of this run, and is not."""


def digest(identity: Any) -> str:
    """Hex digest of something JSON-able."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(arrays: Iterable[torch.Tensor | np.ndarray]) -> str:
    """Hex digest of contents, types and shapes."""
    found = hashlib.sha256()
    for array in arrays:
        tensor = torch.as_tensor(array).detach().cpu().contiguous()
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


class Checkpoint:
    """State after a whole epoch or round, in one file that is complete or absent.

    Args:
        path: of the file.
        identity: JSON-able description of the run; a checkpoint of any other run is not continued.
        every: least number of seconds between two saves.
    """

    finished = None

    def __init__(self, path: str | Path, identity: dict, every: float = EVERY):
        self.path, self.every, self.saved = Path(path), every, time.monotonic()
        self.identity = digest(identity)

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        return time.monotonic() - self.saved >= self.every

    def save(self, state: dict, last: bool = False) -> None:
        """Save if enough time has passed (the last epoch is the result, and is saved by the caller)."""
        if not last and self.due():
            self.write(state)

    def write(self, state: dict) -> None:
        """Save now."""
        with atomic(self.path) as temporary:
            torch.save({"identity": self.identity, **state}, temporary)
        self.saved = time.monotonic()

    def load(self, device: torch.device) -> dict | None:
        """The state of this run, or None."""
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
            identity = state["identity"]
            # torch writes check sums of the records and does not look at them: a turned bit would be trained on
            with zipfile.ZipFile(self.path) as file:
                if damaged := file.testzip():
                    raise OSError(f"check sum of {damaged}")
        except Exception as error:
            print(f"checkpoint {self.path} cannot be read ({type(error).__name__}): starting anew", file=sys.stderr)
            return None
        if identity != self.identity:
            print(f"checkpoint {self.path} is of another run (settings changed): starting anew", file=sys.stderr)
            return None
        return state

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Around the use of a loaded state.

        Raises:
            DamagedCheckpoint: the state does not fit, and the file is removed: what it was put into is half overwritten
                and cannot be trained from the start.
        """
        try:
            yield
        except Exception as error:
            self.remove()
            raise DamagedCheckpoint(f"checkpoint {self.path} does not fit this run and was removed: run the same command "
                                    f"again ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None

    def remove(self) -> None:
        """Once the result is safe."""
        self.path.unlink(missing_ok=True)


def _state(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, torch.Tensor):
        return part.detach()
    return part.state_dict() if hasattr(part, "state_dict") else part


def restore(part: Any, state: Any) -> None:
    """Put a saved state back in place: of a tensor, a generator, anything with `load_state_dict`, a dict or a list.

    Raises:
        ValueError: a tensor of another shape.
    """
    if isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    elif isinstance(part, torch.Tensor):
        if state.shape != part.shape:
            raise ValueError(f"a tensor of shape {tuple(state.shape)} in place of {tuple(part.shape)}")
        with torch.no_grad():
            part.copy_(state)
    elif hasattr(part, "load_state_dict"):
        part.load_state_dict(state)
    elif isinstance(part, dict):
        part.clear()
        part.update(state)
    else:
        part[:] = state


class Resume:
    """How far a method with several loops or trainings has come, all in one checkpoint.

        work = budget.resume(mask=mask, optimizer=optimizer, history=history)
        for number in work.each(range(rounds), "rounds"):
            ...

    A continued run executes the same lines again, and draws the same random numbers between its loops, but rounds that
    are done are left out: `each` skips them, and so does `fit(..., checkpoint=work)` with a training that is done, if its
    network is held (after the last training of a method, nothing needs to be).

    What is held gets its saved state back at once. It must be all that one round leaves to the next, changed in place:
    modules, optimisers, anything else with `state_dict` and `load_state_dict`, tensors, random generators, and lists and
    dicts of tensors and plain values.

    Args: see `Checkpoint`; without a path nothing is kept.
    """

    def __init__(self, path: str | Path | None, identity: dict, device: str | torch.device = "cpu"):
        self.keeper = Checkpoint(path, identity, EVERY) if path else None
        self.held, self.title = {}, identity.get("defence", "defence")
        self.parts, self.loops, self.trainings, self.current = {}, {}, {}, None
        if self.keeper and (state := self.keeper.load(torch.device(device))):
            with self.keeper.restoring():
                self.parts, self.trainings, self.current = dict(state["parts"]), dict(state["trainings"]), state["current"]
                self.loops = {name: None if count is None else int(count) for name, count in state["loops"].items()}

    def hold(self, **parts) -> "Resume":
        """Keep parts under names that differ within the method; those that were saved are restored."""
        self.held |= parts
        for name in [name for name in parts if name in self.parts]:
            with self.keeper.restoring():
                restore(parts[name], self.parts.pop(name))
        return self

    def each(self, items: Iterable, name: str, said: Callable[[], str] = str) -> Iterator:
        """The items that are not done, with a line of progress where it is known how many there are.

        `name` tells loops apart, those within a loop carry the number of its round; `said` adds to the line.
        """
        if self.loops.setdefault(name, 0) is None:
            return
        progress = None
        if hasattr(items, "__len__"):
            progress = Progress(f"{self.title}, {name}", len(items), self.loops[name], unit="rounds")
        for item in itertools.islice(items, self.loops[name], None):
            yield item
            self.loops[name] += 1
            self.save()
            if progress:
                progress(1, said() or "under way")
        if progress:
            progress.close()

    def end(self, name: str) -> None:
        """Nothing is left of a loop that is left early, for a reason that later loops overwrite."""
        self.loops[name] = None

    def save(self, current: dict | None = None) -> None:
        """Save if enough time has passed; `current` is the state of a training under way."""
        if self.keeper and self.keeper.due():
            parts = self.parts | {name: _state(part) for name, part in self.held.items()}
            self.keeper.write({"parts": parts, "loops": self.loops, "trainings": self.trainings, "current": current})


class Training:
    """A training within a `Resume`: what `fit` uses in place of a `Checkpoint`.

    Attributes:
        finished: its history, if it is done.
    """

    def __init__(self, work: Resume, model: nn.Module, identity: dict):
        self.work, self.model, self.key = work, model, digest(identity)
        self.finished = work.trainings.get(self.key)
        self.restoring = work.keeper.restoring if work.keeper else contextlib.nullcontext

    def load(self, device: torch.device) -> dict | None:
        """The state of this training, or None."""
        state, self.work.current = self.work.current, None
        if state is not None:
            with self.restoring():
                if state["key"] != self.key:
                    raise ValueError("it is in the middle of another training")
        return state

    def save(self, state: dict, last: bool = False) -> None:
        """As `Checkpoint.save`, but what is left by the last epoch is kept if the network is held."""
        if not last:
            self.work.save({"key": self.key, **state})
        elif any(self.model is module for part in self.work.held.values() if isinstance(part, nn.Module)
                 for module in part.modules()):
            self.work.trainings[self.key] = state["history"]
            self.work.save()
