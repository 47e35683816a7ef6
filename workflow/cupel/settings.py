"""Settings files as plain data: read, checked against their schema, and wrong ones refused in sentences for people."""

from pathlib import Path

import yaml
from jsonschema import Draft202012Validator

from cupel.registry import unknown

LIBRARY = Path(__file__).parent
PAPERS = LIBRARY.parent / "papers"
SCHEMAS = LIBRARY.parent / "schemas"
#: the safe loader, in C where PyYAML was built with it: ten times faster, and the files are read at every start
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ConfigError(ValueError):
    """A setting is wrong: the text names file, key, what was found and what is allowed."""


def read_yaml(path: str | Path) -> dict:
    """A YAML file as plain data.

    Raises:
        ConfigError: not readable as YAML.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), LOADER) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None


def _sentence(error, file) -> str:
    key = ".".join(str(part) for part in error.absolute_path) or "(top level)"
    found = error.instance
    if error.validator == "additionalProperties":
        allowed = sorted(error.schema.get("properties", {}))
        extra = sorted(set(found) - set(allowed))
        where = file if key == "(top level)" else f"{file}: {key}"
        return "; ".join(f"{where}: {unknown('key', name, allowed)}" for name in extra)
    if error.validator == "enum":
        return f"{file}: {key}: {found!r} is not allowed; allowed are {', '.join(map(str, error.validator_value))}"
    if error.validator == "type":
        kinds = error.validator_value
        return f"{file}: {key}: {found!r} should be of type {kinds if isinstance(kinds, str) else ' or '.join(kinds)}"
    if error.validator == "pattern" and "description" in error.schema:
        return f"{file}: {key}: {found!r} is not {error.schema['description']}"
    if error.validator == "required":
        return f"{file}: {key}: {error.message}"
    if error.validator in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        words = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
        return f"{file}: {key}: {found!r} is out of range: it must be {words[error.validator]} {error.validator_value}"
    if error.validator in ("anyOf", "oneOf"):
        options = error.schema[error.validator]
        allowed = [str(option.get("enum") or option.get("type") or option.get("const")) for option in options]
        return f"{file}: {key}: {found!r} is not allowed; allowed are {', '.join(allowed)}"
    return f"{file}: {key}: {error.message}"


def schema(name: str) -> dict:
    """The JSON schema `schemas/<name>.schema.yaml`."""
    return read_yaml(SCHEMAS / f"{name}.schema.yaml")


def check_schema(content: dict, schema: dict, file: str | Path) -> None:
    """Compare the content of a settings file with its JSON schema.

    Raises:
        ConfigError: one line per mistake.
    """
    errors = sorted(Draft202012Validator(schema).iter_errors(content), key=lambda e: str(list(e.absolute_path)))
    if errors:
        raise ConfigError("\n".join(_sentence(error, file) for error in errors))


def typed(content, schema: dict):
    """Content with strings turned into what the schema asks for, where it asks for a number or a truth value.

    Snakemake's command line leaves nested values, as in `--config seeds=[0,1]`, as strings.
    """
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(content, dict):
        known = schema.get("properties", {})
        return {key: typed(value, known.get(key, {})) for key, value in content.items()}
    if isinstance(content, list):
        return [typed(value, schema.get("items", {})) for value in content]
    if isinstance(content, str) and {"integer", "number", "boolean"} & set(kinds):
        try:
            value = yaml.safe_load(content)
        except yaml.YAMLError:
            return content
        return value if isinstance(value, (int, float)) or (value is None and "null" in kinds) else content
    return content
