"""The help page of a command: usage, text, examples, and its flags in panels of two columns.

typer's own page gives each kind of name a column, which leaves a third of 80 characters for the
text and cuts long names.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperCommand

ARGUMENTS, OPTIONS = "Arguments", "Options"
NARROWEST = 24  # of the column of names


class Command(TyperCommand):
    """A command that prints this page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        console = Console(highlight=False)
        panels: dict[str, list[Any]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            panels[panel_of(parameter)].append(parameter)
        panels[OPTIONS] = panels.pop(OPTIONS)  # last
        usage = [ctx.command_path, *(p.metavar for p in panels.get(ARGUMENTS, [])), "[OPTIONS]"]
        console.print(f"\n[bold]Usage:[/] {escape(' '.join(usage))}\n")
        for paragraph in (self.help or "").split("\n\n"):
            console.print(laid_out(paragraph, console.width))
        console.print()
        names = {id(p): name_of(p) for rows in panels.values() for p in rows}
        longest = max(len(word) for name in names.values() for word in name.split())
        for title, rows in panels.items():
            table = Table.grid(padding=(0, 2, 0, 0), expand=True)
            table.add_column(width=max(NARROWEST, longest))
            table.add_column(ratio=1)
            for parameter in rows:
                flags, _, value = names[id(parameter)].partition(" =")
                shown = f"[bold cyan]{escape(flags)}[/] [yellow]{escape(value)}[/]"
                table.add_row(shown, parameter.help)
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))


def panel_of(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return ARGUMENTS
    return getattr(parameter, "rich_help_panel", None) or OPTIONS


def name_of(parameter: Any) -> str:
    """`--flag, --other =VALUE`, or the argument's name."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    flags = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return f"{flags} ={parameter.metavar}" if parameter.metavar else flags


def laid_out(paragraph: str, width: int) -> str:
    """A paragraph of a docstring filled to `width`; an indented one is a command to copy."""
    if not paragraph.startswith(" "):
        return textwrap.fill(" ".join(paragraph.split()), width - 1) + "\n"
    lines = textwrap.wrap(
        " ".join(paragraph.split()), width - 3, initial_indent="  ", subsequent_indent="    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return escape(" \\\n".join(lines))
