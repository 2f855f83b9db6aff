"""Command-line flags made from a pydantic configuration, one per field, so that both agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from afaspec.config import load_config

TargetAdapter = Annotated[
    Path | None,
    typer.Option(
        "--target-adapter",
        help="LoRA adapter (PEFT) that the target is served with; merged once, cached.",
        show_default=False,
    ),
]

SuiteFolder = Annotated[
    Path | None,
    typer.Option(
        "--suite-folder",
        help="Folder with the files of suites (default: AFASPEC_DATA; else they are fetched).",
        show_default=False,
    ),
]

GateFile = Annotated[
    Path | None,
    typer.Option(
        "--gate",
        help="report.json of a baseline: exit code 3 if this run is worse beyond its interval.",
        show_default=False,
    ),
]

GateTolerance = Annotated[
    float,
    typer.Option(help="Relative loss that the gate lets pass: 0.02 is 2%.", min=0.0, max=1.0),
]


def config_command(
    model: type[BaseModel], run: Callable[..., None], arguments: tuple[str, ...] = ()
) -> Callable[..., None]:
    """A typer command with `--config FILE` and a flag for every field of `model`.

    Fields in `arguments` become positional. `run` gets the checked configuration; its docstring is
    the help text.
    """
    parameters, names = [], {}
    for dotted, field in flatten(model):
        parameter = dotted.replace(".", "_")
        names[parameter] = dotted
        parameters.append(make_parameter(parameter, field, positional=dotted in arguments))
    file = Annotated[
        Path | None, typer.Option("--config", help="YAML file with these settings; flags win.")
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("config_file", keyword, default=None, annotation=file))

    def command(config_file: Path | None = None, **flags: Any) -> None:
        given = {names[key]: value for key, value in flags.items() if value not in (None, [])}
        run(load_config(model, config_file, given))

    command.__doc__, command.__name__ = run.__doc__, run.__name__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def flatten(model: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    """(dotted name, field) of every leaf of `model`."""
    leaves = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            leaves += flatten(kind, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, field))
    return leaves


def make_parameter(name: str, field: FieldInfo, positional: bool) -> inspect.Parameter:
    """An optional parameter; None means not given, so that the file's value or default holds."""
    help_text = field.description or ""
    if field.default not in (None, ...) and not field.is_required():
        help_text = f"{help_text} [default: {written(field.default)}]".strip()
    help_text = help_text.replace("[", r"\[")  # or Rich takes it for a style
    kind = leaf_type(field.annotation)
    flag = f"--{name.replace('_', '-')}"
    info: Any
    if positional:
        info = typer.Argument(help=help_text, show_default=False)
    elif kind is bool:
        info = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text, show_default=False)
    else:
        info = typer.Option(flag, help=help_text, show_default=False)
    annotation = list[kind] | None if is_list(field.annotation) else kind | None  # type: ignore[valid-type]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation, info],
    )


def written(default: Any) -> str:
    """A default as it would be given on the command line."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(
        get_origin(a) is list for a in get_args(annotation)
    )


def leaf_type(annotation: Any) -> Any:
    """The plain type to parse: None and lists are stripped, literals read as text."""
    if get_origin(annotation) is Literal:
        return str
    inner = [a for a in get_args(annotation) if a is not type(None)]
    return leaf_type(inner[0]) if inner else annotation
