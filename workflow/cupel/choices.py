"""What must be one of a few names: arguments, and fields of settings whose type says which."""

from collections.abc import Iterable
from typing import Literal, get_args, get_origin, get_type_hints

from cupel.registry import unknown


def one_of(kind: str, name: str, known: Iterable[str]) -> None:
    """Check that a name is known; `kind` says what it names.

    Raises:
        ValueError: it is not; the text lists the known names.
    """
    if name not in known:
        raise ValueError(unknown(kind, name, known))


def check_choices(settings: object) -> None:
    """Check the fields of a dataclass that are a `Literal`.

    Raises:
        ValueError: one has another value.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            one_of(name, getattr(settings, name), get_args(hint))
