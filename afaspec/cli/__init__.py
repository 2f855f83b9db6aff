"""The command line: one module per command, imported when it runs, so that start-up is light."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from afaspec.cli.help import Command
from afaspec.cli.processes import check_command, one_message
from drafts.errors import UserError

# Panels of `afaspec --help`: each command with its module here and what it is for.
PANELS = {
    "Adapt": {
        "capture": ("adapt.capture", "Record a target's answers and hidden states for training"),
        "copy": ("adapt.copy", "Copy a feature store to or from a bucket or a server"),
        "train": ("adapt.train", "Train a draft adapter: LoRA, AFA-LoRA, or all weights"),
        "merge": ("adapt.merge", "Merge a finished adapter into its base draft"),
        "plan": ("adapt.plan", "Say what capture, training and bench will take and cost"),
        "compare": ("adapt.compare", "Train whole arms side by side and compare them"),
    },
    "Serve": {
        "serve": ("live.serve", "Serve a target with a draft through vLLM"),
        "swap": ("live.swap", "Change the draft of a running server"),
        "watch": ("live.watch", "Look whether a running server's draft is still accepted"),
        "loop": ("live.loop", "Let a running server's draft follow its traffic"),
        "collect": ("live.collect", "Keep a share of a server's traffic, from before it"),
        "traffic": ("live.traffic", "Say what was collected, write it out, or purge it"),
    },
    "Measure": {
        "bench": ("measure.bench", "Measure drafts side by side: acceptance, speed, same output"),
        "report": ("measure.report", "Compare finished runs, or render one again"),
        "sweep": ("measure.sweep", "Find the best k at each load, and when to draft at all"),
        "tune": ("measure.tune", "Choose k for each load on this machine, or not to draft"),
        "what-if": ("measure.what_if", "Predict another draft, k, load or target from a sweep"),
        "suites": ("measure.suites", "List the prompts that come with afaspec"),
    },
    "Drafts": {
        "inspect": ("draft.inspect", "Say what a draft is, and whether it fits a target"),
        "convert": ("draft.convert", "Write a draft in another layout of its family"),
        "init": ("draft.init", "Write a fresh draft to train from scratch"),
        "build-embedded": ("build_embedded", "Make the shipped target and draft again"),
    },
    "This machine": {
        "demo": ("demo", "Adapt a shipped draft to another domain and measure it"),
        "doctor": ("doctor", "Check what is installed, and what mends it"),
    },
}
MODULES = {name: module for panel in PANELS.values() for name, (module, _) in panel.items()}
UsageError: Any = typer.BadParameter.__base__  # of typer's parser, which names it nowhere in public


class Commands(TyperGroup):
    """Lists the commands without importing them; the one that is asked for is imported then."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else command, rest


app = typer.Typer(
    name="afaspec",
    cls=Commands,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt a speculative-decoding draft to your target and traffic, serve it, measure it.",
)
for _panel, _commands in PANELS.items():
    for _name, (_, _summary) in _commands.items():
        app.command(_name, help=_summary, rich_help_panel=_panel)(lambda: None)

_debug = False


def load(name: str) -> Any:
    """The command itself, from its module."""
    module = import_module(f"afaspec.cli.{MODULES[name]}")
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name, cls=Command)(getattr(module, name.replace("-", "_")))
    return typer.main.get_command(alone)


def _version(asked: bool) -> None:
    if asked:
        from afaspec import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    global _debug
    _debug = debug
    check_command(ctx.invoked_subcommand)
    if ctx.invoked_subcommand is None:
        ctx.get_help()


def main() -> None:
    """Entry point: a `UserError` becomes one message and exit code 2, without a traceback."""
    try:
        with one_message((UserError, UsageError)):
            code = app(prog_name="afaspec", standalone_mode=False)
    except UserError as error:
        if _debug:
            raise
        code = refuse(error)
    except UsageError as error:
        asked = " ".join(["afaspec", *(name for name in sys.argv[1:2] if name in MODULES)])
        code = refuse(UserError(error.format_message(), hint=f"see {asked} --help"))
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        from afaspec.cli.console import console

        console.print("Stopped. Run the same command again to go on from here.")
    sys.exit(code)


def refuse(error: UserError) -> int:
    from rich.markup import escape

    from afaspec.cli.console import console

    console.quiet = False  # as it is in all processes of a command but the first
    console.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return error.exit_code
