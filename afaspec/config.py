"""Configuration: a YAML file, overridden by flags, checked by a pydantic model."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from drafts.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def load_config(model: type[Model], file: Path | None, flags: dict[str, Any]) -> Model:
    """Build `model` from `file` (YAML) and `flags`, which win. None flags count as not given.

    A dotted flag sets a nested field. Raises `UserError` naming the file's line for each mistake.
    """
    text = read_yaml_text(file) if file else ""
    values = parse_yaml(text, file)
    for name, value in flags.items():
        if value is not None:
            set_nested(values, name, value)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise describe(error, model, text, file) from None


def read_yaml_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such file", where=file, hint="check the path after --config") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError("is not a text file", where=file, hint="give a YAML file") from None


def parse_yaml(text: str, file: Path | None) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(text) or {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(
            f"is not valid YAML: {error.problem}", where=f"{file}:{line}", hint="correct the line"
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            "holds no `name: value` lines", where=file, hint="write one setting per line"
        )
    return values


def set_nested(values: dict[str, Any], name: str, value: Any) -> None:
    """Set `values["a"]["b"]` for the name `a.b`."""
    *outer, last = name.split(".")
    for part in outer:
        values = values.setdefault(part, {})
    values[last] = value


def describe(
    error: ValidationError, model: type[BaseModel], text: str, file: Path | None
) -> UserError:
    """The first mistake, with its line and the nearest valid key."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(path) or model.__name__
    line = find_line(text, path)
    where = (f"{file}:{line}" if line else str(file)) if file else None
    if first["type"] == "extra_forbidden":
        inner = model_at(model, path[:-1])
        prefix = "" if inner is model else ".".join(path[:-1]) + "."
        known = field_names(inner, prefix)
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        return UserError(f"unknown setting {name}", where=where, hint=hint)
    if first["type"] == "missing":
        return UserError(
            f"the setting {name} is missing",
            where=where,
            hint=f"give it in the file or as --{name.replace('_', '-').replace('.', '-')}",
        )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # do not go together
        inside = f"{name}: " if path else ""
        return UserError(f"{inside}{message}", where=where, hint="change one of these settings")
    return UserError(
        f"{name} is {first['input']!r}: {message}", where=where, hint=f"correct {name}"
    )


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All settings, nested ones with dots."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation, f"{prefix}{name}.")
    return names


def model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The model that checks the settings below `path`; keys of a dict count as any name."""
    for key in path:
        field = model.model_fields.get(key)
        annotation = field.annotation if field else None
        inner = [annotation, *get_args(annotation)][-1]
        if field and isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return model


def find_line(text: str, path: list[str]) -> int | None:
    """The line in the YAML text that sets the last key of `path`."""
    found, start = None, 0
    lines = text.splitlines()
    for key in path:
        for number in range(start, len(lines)):
            if lines[number].lstrip("- ").startswith(f"{key}:"):
                found = start = number
                break
    return None if found is None else found + 1
