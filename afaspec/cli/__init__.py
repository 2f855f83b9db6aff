"""The command line: one module per command, registered here. Nothing heavy is imported at start."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated

import typer

from drafts.errors import UserError

COMMANDS = (
    "demo",
    "adapt.capture",
    "adapt.train",
    "adapt.merge",
    "serve",
    "measure.bench",
    "measure.report",
    "measure.sweep",
    "measure.what_if",
    "adapt.compare",
    "measure.suites",
    "draft.inspect",
    "draft.convert",
    "draft.init",
    "doctor",
    "build_embedded",
)

app = typer.Typer(
    name="afaspec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt a speculative-decoding draft to your target and traffic, serve it, measure it.",
)
for _path in COMMANDS:
    _name = _path.rpartition(".")[2]
    _module = import_module(f"afaspec.cli.{_path}")
    app.command(_name.replace("_", "-"))(getattr(_module, _name))

_debug = False


def _version(asked: bool) -> None:
    if asked:
        from afaspec import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    global _debug
    _debug = debug


def main() -> None:
    """Entry point: a `UserError` becomes one message and exit code 2, without a traceback."""
    from afaspec.cli.console import console

    try:
        app()
    except UserError as error:
        if _debug:
            raise
        console.print(f"[bold red]Error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print("Stopped. Run the same command again to go on from here.")
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
