"""`afaspec doctor`: what is here, what is missing, and what mends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from afaspec.doctor import Finding


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON on stdout.")
    ] = False,
) -> None:
    """Check this machine and installation; exit code 1 when something required is missing.

    [bold]Examples[/]

        afaspec doctor

        afaspec doctor --json
    """
    import json
    from dataclasses import asdict

    from afaspec.doctor import diagnose

    findings = diagnose()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print_table(findings)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "warning": "yellow", "missing": "bold red"}
    table = Table(show_header=False)
    for finding in findings:
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, status, escape(finding.found))
    console = Console()
    console.print(table)
    for finding in findings:
        if finding.hint:
            console.print(
                f"[{colours[finding.status]}]{finding.name}[/]: {escape(finding.hint)}",
                soft_wrap=True,
                highlight=False,
            )
