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
    """
    settings, term = TrainingSettings(**training or {}), Consistency(**consistency or {})
    history = train_adapter(victim.base, budget, settings, start=victim.adapter, consistency=term, title="crow")
    return Purified(replace(victim, adapter=budget.work / "model").model(), history,
                    lambda: asdict(settings) | asdict(term) | embedding_scale(victim.base, term.epsilon))


def embedding_scale(base: str | Path, epsilon: float) -> dict[str, float]:
    """Root mean square of the embeddings, and the perturbation's size as a share of it (crow SPEC 11.3)."""
    for path in sorted(Path(base).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                if name.endswith("embed_tokens.weight"):
                    rms = float(file.get_tensor(name).float().square().mean().sqrt())
                    return {"embedding_rms": rms, "epsilon_relative": epsilon / rms}
    return {}
