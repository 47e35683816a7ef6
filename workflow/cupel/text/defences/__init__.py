"""Defences of language models, one file each, with one interface: `purify(name, victim, budget, **settings)`.

A defence is a function of the victim and the defender's budget. Its keyword arguments are the sections of settings that it
reads, each a dict. One that trains the victim's adapter further leaves it in `budget.work/model`.
"""

from cupel.settings import check_schema, schema
from cupel.text.defences.base import Purified, Victim, defence
from cupel.text.training import Budget

__all__ = ["Budget", "Purified", "Victim", "check", "defence", "purify"]


def check(name: str, settings: dict[str, dict]) -> None:
    """Check the sections of settings of a defence.

    Raises:
        ConfigError: a value that it cannot have.
    """
    form = schema("text")["$defs"]
    check_schema(settings, {**form["defence"], "$defs": form}, f"defence {name}")


def purify(name: str, victim: Victim, budget: Budget, **settings: dict) -> Purified:
    """Run a defence on a victim.

    Args:
        name: registered name, e.g. `crow`.
        victim: see `Victim`.
        budget: the defender's clean samples and machine; a killed run in the same `work` is continued.
        settings: sections of settings, e.g. `training={"epochs": 5}`.

    Raises:
        ValueError: an unknown name, or a setting that it cannot have.
        TypeError: the defence returns something else.
    """
    check(name, settings)
    found = defence.find(name)(victim, budget, **settings)
    if not isinstance(found, Purified):
        raise TypeError(f"defence {name!r} must return Purified(model, history), but returned {type(found).__name__}")
    return found
