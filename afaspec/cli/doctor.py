"""`afaspec doctor`: what is here, what is missing, and what mends it."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from afaspec.cli.flags import configured
from afaspec.doctor import Finding
from bench.records.settings import Settings


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
    from afaspec.doctor import diagnose

    findings = diagnose()
    if config.as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print_table(findings)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _print_table(findings: list[Finding]) -> None:
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
