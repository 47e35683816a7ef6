"""Fields of settings whose type says which few names they may have."""

from typing import Literal, get_args, get_origin, get_type_hints

from cupel.registry import one_of


def check_choices(settings: object) -> None:
    """Check the fields of a dataclass that are a `Literal`.

    Raises:
        ValueError: one has another value.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            one_of(name, getattr(settings, name), get_args(hint))
