"""CROW: the victim's adapter is trained further with the consistency of layers as a second term (crow SPEC 2; 1e-3)."""

from dataclasses import asdict, replace
from pathlib import Path

from safetensors import safe_open

from cupel.text.consistency import Consistency
from cupel.text.defences.base import Purified, Victim, defence
from cupel.text.training import Budget, TrainingSettings, train_adapter


@defence("crow")
def crow(victim: Victim, budget: Budget, *, training: dict | None = None, consistency: dict | None = None) -> Purified:
    """Internal consistency regularisation.

    Args:
        training: fields of `TrainingSettings`.
        consistency: fields of `Consistency`, which holds the variants.

    Raises:
        ValueError: epsilon is in units of the embeddings' RMS, and the model's embeddings are not found.
    """
    settings, term = TrainingSettings(**training or {}), Consistency(**consistency or {})
    rms = embedding_rms(victim.base)
    if term.unit == "rms":
        if rms is None:
            raise ValueError(f"{victim.base}: its safetensors have no embed_tokens.weight, of which epsilon is a share: "
                             "give epsilon with unit: absolute")
        term = replace(term, epsilon=term.epsilon * rms, unit="absolute")
    history = train_adapter(victim.base, budget, settings, start=victim.adapter, consistency=term, title="crow")
    sizes = {"embedding_rms": rms, "epsilon_relative": term.epsilon / rms} if rms else {}
    return Purified(replace(victim, adapter=budget.work / "model").model(), history,
                    lambda: asdict(settings) | asdict(term) | sizes)


def embedding_rms(base: str | Path) -> float | None:
    """Root mean square of a model's embeddings (crow SPEC 11.3); None where no tensor has their usual name."""
    for path in sorted(Path(base).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                if name.endswith("embed_tokens.weight"):
                    return float(file.get_tensor(name).float().square().mean().sqrt())
    return None
