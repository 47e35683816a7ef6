"""Attacks, one file each. `build(name, **parameters)` gives one; plugins register more."""

from dataclasses import fields

from cupel.images.attacks.base import Attack, AttackHook, ImpossibleRate, PoisonRecord, attack
from cupel.limits import check

ATTACKS = attack

__all__ = ["ATTACKS", "Attack", "AttackHook", "ImpossibleRate", "PoisonRecord", "attack", "build"]


def build(name: str, **parameters) -> Attack:
    """An attack by its registered name.

    Raises:
        ValueError: unknown name, a parameter that it does not have, or a value that is none for it.
    """
    kind = ATTACKS.find(name)
    check("images", "attacks", name, kind, parameters)
    try:
        return kind(**parameters)
    except TypeError as error:
        known = ", ".join(sorted(field.name for field in fields(kind) if field.name != "tensors"))
        raise ValueError(f"attack {name}: {str(error).split('() ')[-1]}; its parameters are {known}") from None
