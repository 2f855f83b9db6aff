"""Configuration: a YAML file, overridden by flags, checked by a pydantic model."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from drafts.errors import UserError

Model = TypeVar("Model", bound=BaseModel)

TargetAdapter = Annotated[
    Path | None,
    Field(description="LoRA adapter (PEFT) that the target is served with; merged once, cached"),
]

# What to give instead, by the kind of mistake that pydantic found.
ADVICE = {
    "greater_than": "give more than {gt:g}",
    "greater_than_equal": "give {ge:g} or more",
    "less_than": "give less than {lt:g}",
    "less_than_equal": "give {le:g} or less",
    "literal_error": "give {expected}",
    "finite_number": "give a finite number",
    "int_parsing": "give a whole number",
    "float_parsing": "give a number",
    "bool_parsing": "give true or false",
}
NUMBER_ERRORS = (
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
)


@dataclass(frozen=True)
class Setting:
    """A leaf of a configuration. `name` has dots where models are nested, as YAML's keys go deeper.

    `others` are further names that mean the same; `group` is the GROUP of the class that declares
    the field.
    """

    name: str
    others: tuple[str, ...]
    field: FieldInfo
    group: str | None

    @property
    def flag(self) -> str:
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """A setting's name as a flag: `annealing.end` is --annealing-end."""
    return "--" + name.replace("_", "-").replace(".", "-")


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Every leaf of `model`, nested ones in place. A field with an alias goes by the alias."""
    for name, field in model.model_fields.items():
        alias, kind = field.validation_alias or name, field.annotation
        names = alias.choices if isinstance(alias, AliasChoices) else [alias]
        first, *others = (f"{prefix}{one}" for one in names)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings(kind, f"{first}.")
        else:
            declaring = (c for c in reversed(model.__mro__) if name in inspect.get_annotations(c))
            yield Setting(first, tuple(others), field, next(declaring).__dict__.get("GROUP"))


def load_config(
    model: type[Model],
    file: Path | None,
    flags: Mapping[str, Any],
    spelled: Mapping[str, str] | None = None,
) -> Model:
    """Build `model` from `file` (YAML) and `flags`, which win. None flags count as not given.

    A dotted flag sets a nested field; `spelled` has what a setting is called on the command line
    where that is not its flag. Raises `UserError` for the first mistake, with the file's line.
    """
    text, values = read_yaml(file) if file else ("", {})
    for setting in settings(model):
        for other in setting.others:
            if other in values:
                values.setdefault(setting.name, values.pop(other))
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
        set_nested(values, name, value)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise describe(first, model, text, file, given, spelled or {}) from None
    except UserError as error:  # what a validator says in words of its own
        raise UserError(error.problem, where=error.where or file, hint=error.hint) from None


def read_yaml(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of `file` and what it says."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
    except FileNotFoundError:
        raise UserError("no such file", where=file, hint="check the path after --config") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError("is not a text file", where=file, hint="give a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(
            f"is not valid YAML: {error.problem}", where=f"{file}:{line}", hint="correct the line"
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            "holds no `name: value` lines", where=file, hint="write one setting per line"
        )
    return text, values


def set_nested(values: dict[str, Any], name: str, value: Any) -> None:
    """Set `values["a"]["b"]` for the name `a.b`."""
    *outer, last = name.split(".")
    for part in outer:
        values = values.setdefault(part, {})
    values[last] = value


def describe(
    error: ErrorDetails,
    model: type[BaseModel],
    text: str,
    file: Path | None,
    flags: Mapping[str, Any],
    spelled: Mapping[str, str],
) -> UserError:
    """The mistake in words: its line or flag, what was found, and what to give instead."""
    path = [str(part) for part in error["loc"]]
    name, kind = ".".join(path) or model.__name__, error["type"]
    flag = next((f for f in flags if name == f or name.startswith(f"{f}.")), None)
    line = find_line(text, path)
    where = (f"{file}:{line}" if line else str(file)) if file and flag is None else None
    if kind == "extra_forbidden":
        inner = model_at(model, path[:-1])
        prefix = "" if inner is model else ".".join(path[:-1]) + "."
        known = [setting.name for setting in settings(inner, prefix)]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        return UserError(f"unknown setting {name}", where=where, hint=hint)
    if kind == "missing":
        hint = f"give {spelled.get(name, flag_of(name))}, or {name} in the file of --config"
        return UserError(f"the setting {name} is missing", where=where, hint=hint)
    found, message = error["input"], error["msg"].removeprefix("Value error, ")
    if kind == "value_error" and isinstance(found, dict):  # settings that do not go together
        inside = f"{name}: " if path else ""
        return UserError(f"{inside}{message}", where=where, hint="change one of these settings")
    if name == flag and "." not in name:
        name = spelled.get(name, flag_of(name))
    shown = found if kind in NUMBER_ERRORS else repr(found)
    if kind in ADVICE:
        hint = ADVICE[kind].format(**error.get("ctx", {})).replace("'", "")
        return UserError(f"{name} is {shown}", where=where, hint=hint)
    return UserError(f"{name} is {shown}: {message}", where=where, hint=f"correct {name}")


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
