"""What a job on a vision-language model reads, as one object."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Inputs:
    """Where the inputs of a stage lie; each stage says which it takes.

    Attributes:
        data: prepared folder, untouched: its test split is for CP.
        poisoned: folder of the poisoned training set.
        triggered: folder of the triggered test set, for ASR.
        base: folder of the model before fine-tuning, where `stages.build` made it.
        victim: folder of the victim's model.
        before: metrics of the victim.
        entropies, attention: of `attention.read_attention`, the table and the record.
        flags: decision of a filter, of `detection.measure_filters`.
    """

    data: str | Path | None = None
    poisoned: str | Path | None = None
    triggered: str | Path | None = None
    base: str | Path | None = None
    victim: str | Path | None = None
    before: str | Path | None = None
    entropies: str | Path | None = None
    attention: str | Path | None = None
    flags: str | Path | None = None

    @classmethod
    def of(cls, files: Mapping) -> "Inputs":
        """Of files by name: a manifest stands for its folder, and what is empty is not there."""
        return cls(**{name: Path(file).parent if Path(file).name == "manifest.json" else file
                      for name, file in files.items() if file})
