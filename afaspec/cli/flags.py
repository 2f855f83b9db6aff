"""Command-line flags made from a pydantic configuration, one for each field, so that both agree.

A field's name (or its alias) is the flag, its description the help text, its default what is shown;
a Literal shows its choices, a bool has --x and --no-x, a list may be repeated, and a tuple is read
by the configuration from text with commas. The class that declares the field says by its GROUP in
which panel the flag stands. typer finds the flags; the configuration alone checks the values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from keyword import iskeyword
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.markup import escape

from afaspec.config import Setting, flag_of, load_config, settings

Model = TypeVar("Model", bound=BaseModel)
METAVARS = {bool: "", int: "INT", float: "FLOAT", Path: "PATH"}


def configured(
    model: type[Model],
    *,
    arguments: tuple[str, ...] = (),
    names: Mapping[str, str] | None = None,
) -> Callable[[Callable[[Model], None]], Callable[..., None]]:
    """Make a function of a configuration a command with `--config FILE` and a flag for every field.

    Fields in `arguments` are positional, in this order. `names` has the flags of nested fields that
    are not called after their whole path. The function's docstring is the help text.
    """
    spelled = {**{name: name.upper() for name in arguments}, **(names or {})}

    def decorate(run: Callable[[Model], None]) -> Callable[..., None]:
        found = {identifier(setting.name): setting for setting in settings(model)}
        parameters = [
            *(argument(name, found[name]) for name in arguments),
            *(
                option(name, setting, spelled.get(setting.name, setting.flag))
                for name, setting in found.items()
                if setting.name not in arguments
            ),
            keyword("config_file", Path | None, typer.Option(
                "--config", help="settings from a YAML file; flags win", metavar="FILE",
            )),
        ]  # fmt: skip

        def command(config_file: Path | None = None, **flags: Any) -> None:
            given = {found[key].name: value for key, value in flags.items() if value != []}
            run(load_config(model, config_file, given, spelled))

        command.__doc__, command.__name__ = run.__doc__, run.__name__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def identifier(name: str) -> str:
    """A setting's name as that of a Python parameter."""
    return name.replace(".", "_") + "_" * iskeyword(name)


def argument(name: str, setting: Setting) -> inspect.Parameter:
    shown = name.upper() if setting.field.is_required() else f"[{name.upper()}]"
    if repeats(setting.field.annotation):
        shown += "..."
    info = typer.Argument(help=help_text(setting), show_default=False, metavar=shown)
    return keyword(name, text_type(setting.field.annotation), info)


def option(name: str, setting: Setting, flag: str) -> inspect.Parameter:
    kind = text_type(setting.field.annotation)
    flags = [flag, *map(flag_of, setting.others)]
    if kind == bool | None:
        flags = [f"{flag}/--no-{flag[2:]}"]
    info = typer.Option(
        *flags,
        help=help_text(setting),
        show_default=False,
        metavar=metavar(setting.field.annotation),
        rich_help_panel=setting.group,
    )
    return keyword(name, kind, info)


def keyword(name: str, kind: Any, info: Any) -> inspect.Parameter:
    """An optional parameter; None means not given, so that the file's value or default holds."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info]
    )


def help_text(setting: Setting) -> str:
    """The description with what holds where nothing is given, as rich's markup."""
    field = setting.field
    text = escape(field.description or "")
    if field.is_required():
        return f"{text} [red]\\[required][/]".strip()
    default = field.get_default(call_default_factory=True)
    if default in (None, "", [], {}) or default is False or "default:" in text:
        return text
    return f"{text} [dim]{escape(f'[default: {written(default)}]')}[/]".strip()


def written(default: Any) -> str:
    """A default as it would be given on the command line."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return ",".join(map(written, default))
    if isinstance(default, float):
        return f"{default:g}"
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def text_type(annotation: Any) -> Any:
    """What typer is to hand on: a truth value, texts, or a text."""
    if bool in (annotation, *get_args(annotation)):
        return bool | None
    return list[str] | None if repeats(annotation) else str | None


def repeats(annotation: Any) -> bool:
    return list in (get_origin(annotation), *map(get_origin, get_args(annotation)))


def metavar(annotation: Any) -> str:
    """What stands for the value: the choices, or the kind of value."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    inner = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) is tuple:
        return f"{metavar(inner[0])},..."
    return metavar(inner[0]) if inner else METAVARS.get(annotation, "TEXT")
