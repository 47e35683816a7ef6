"""What a defence of language models is given, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from cupel.registry import Registry
from cupel.text.training import deployed

defence = Registry("defence of language models", "cupel.text.defences")


@dataclass(frozen=True)
class Victim:
    """A model with a backdoor, as folders.

    Attributes:
        base: folder of the base model.
        adapter: folder of the victim's adapter; None: the base model itself.
        reference: folder of the adapter of a model to compare with; None: the base model.
        precision: of merged weights: `fp32`, `bf16` or `fp16`.
        device: where to put it.
    """

    base: str | Path
    adapter: str | Path | None
    reference: str | Path | None = None
    precision: str = "fp32"
    device: str = "cpu"

    def model(self) -> nn.Module:
        """The victim as it is used: its adapter merged into the base model's weights."""
        return deployed(self.base, self.adapter, self.precision, self.device)


@dataclass(frozen=True)
class Purified:
    """A model after a defence.

    Attributes:
        model: in eval mode; it answers by `generate`, as models of transformers do.
        history: flat rows: of updates, of layers.
        facts: gives what the record of the cell says beside the scores; called once the model has answered.
        same_weights: the defence changes how answers are made and not the weights: what is read off them is the victim's.
    """

    model: nn.Module
    history: list[dict] = field(default_factory=list)
    facts: Callable[[], dict] = dict
    same_weights: bool = False
