"""Values of parameters: they have the type of their default, and keep within the limits that a family's schema states."""

import functools
import re
from collections.abc import Iterable, Mapping

from cupel.settings import check_schema, schema

KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", tuple: "array"}


@functools.cache
def limits(family: str) -> dict:
    """What the schema of a family states: section -> function, or `*` for all by patterns -> parameter -> JSON schema."""
    return schema(family).get("limits", {})


def form(family: str, section: str, function: str, parameters: Iterable[str], defaults: Mapping) -> dict:
    """JSON schema of the settings of a function of the library.

    Args:
        parameters: names of what it can be given.
        defaults: by name; None, and what is not here, allows any type.
    """
    known = limits(family).get(section, {})
    properties = typed(parameters, defaults)["properties"]
    for key, found in properties.items():
        for pattern, limit in known.get("*", {}).items():
            found |= limit if re.search(pattern, key) else {}
        found |= known.get(function, {}).get(key, {})
    return {"properties": properties}


def typed(parameters: Iterable[str], defaults: Mapping) -> dict:
    """JSON schema of settings that have the types of their defaults: all that is known of a plugin's."""
    kinds = {key: KINDS.get(type(value)) for key, value in defaults.items()}
    return {"properties": {key: {"type": kinds[key]} if kinds.get(key) else {} for key in parameters}}


def check(family: str, section: str, name: str, entry, given: Mapping) -> None:
    """Check what the registered class or function `entry` is given.

    Raises:
        ConfigError: a value is wrong.
    """
    fields = getattr(entry, "__dataclass_fields__", {})
    defaults = {key: field.default for key, field in fields.items()} or entry.__kwdefaults__ or {}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    own = entry.__module__.startswith("cupel.")
    check_schema(plain, form(family, section, name, given, defaults) if own else typed(given, defaults), f"{section}: {name}")
