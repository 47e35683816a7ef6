"""Clean fine-tuning: the victim's adapter is trained further on clean samples (crow SPEC 7; 2e-4 as configured, or 1e-3)."""

from dataclasses import asdict, replace

from cupel.text.defences.base import Purified, Victim, defence
from cupel.text.training import Budget, TrainingSettings, train_adapter


@defence("finetune")
def finetune(victim: Victim, budget: Budget, *, training: dict | None = None) -> Purified:
    """Clean fine-tuning.

    Args:
        training: fields of `TrainingSettings`.
    """
    settings = TrainingSettings(**training or {})
    history = train_adapter(victim.base, budget, settings, start=victim.adapter, title="finetune")
    return Purified(replace(victim, adapter=budget.work / "model").model(), history, lambda: asdict(settings))
