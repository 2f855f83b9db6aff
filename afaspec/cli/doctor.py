"""`afaspec doctor`: what is here, what is missing, and what mends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from pydantic import Field

from afaspec.cli.flags import configured
from bench.records.settings import Settings

if TYPE_CHECKING:
    from afaspec.doctor import Finding


class DoctorConfig(Settings):
    """How the findings are told."""

    as_json: bool = Field(
        False, validation_alias="json", description="print the findings as JSON on stdout"
    )


@configured(DoctorConfig)
def doctor(config: DoctorConfig) -> None:
    """Check this machine and installation; exit code 1 when something required is missing.

    [bold]Examples[/]

      afaspec doctor

      afaspec doctor --json
    """
    import json
    from dataclasses import asdict

    from afaspec.doctor import diagnose

    findings = diagnose()
    if config.as_json:
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
