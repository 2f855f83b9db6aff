"""`afaspec suites`: the suites there are, and where this machine would read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from afaspec.cli.flags import configured
from bench.prompts.suites import PREFIX, SIZES, SUITES, is_here, read_suite
from bench.records.settings import PromptSettings, Settings, SuiteFolder


class SuitesConfig(Settings):
    """Where suites are looked for."""

    suite_folder: SuiteFolder = None
    as_json: bool = Field(False, validation_alias="json", description="print JSON on stdout")


@configured(SuitesConfig)
def suites(config: SuitesConfig) -> None:
    """List the suites: their prompts in both sizes, their categories, and a hash of the content.

    A suite without a file here is fetched when it is used. Two machines measured the same prompts
    where the hashes are equal. `suite:NAME/CATEGORY@SIZE` works wherever prompts are given.

    [bold]Examples[/]

      afaspec suites

      afaspec suites --suite-folder data --json

      afaspec bench embedded --suite code/cpp_headers --size full --draft base=embedded-draft
    """
    rows = [describe(name, config.suite_folder) for name in SUITES]
    if config.as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_table(rows)


def describe(name: str, folder: Path | None) -> dict[str, Any]:
    """What is known of a suite without a network; its sizes are None where it is not here."""
    suite = SUITES[name]
    row: dict[str, Any] = {"name": name, "about": suite.about, "categories": suite.categories}
    if not is_here(suite, folder):
        return {**row, "where": suite.origin, "here": False, "sizes": None}
    settings = PromptSettings(suite_folder=folder)
    found = {size: read_suite(f"{PREFIX}{name}@{size}", settings) for size in SIZES}
    row["categories"] = suite.categories or sorted(
        {prompt.category for prompt in found["full"].prompts if prompt.category}
    )
    sizes = {
        size: {
            "prompts": len(suite.prompts),
            "requests": sum(1 + len(prompt.turns) for prompt in suite.prompts),
            "sha256": suite.sha256,
        }
        for size, suite in found.items()
    }
    return {**row, "where": found["full"].where, "here": True, "sizes": sizes}


def print_table(rows: list[dict[str, Any]]) -> None:
    """One block a suite: what it is, where it is read, and both sizes."""
    console = Console()
    for row in rows:
        console.print(f"[bold]{row['name']}[/]  {escape(row['about'])}", highlight=False)
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(overflow="fold")
        if row["categories"]:
            table.add_row("  categories", ", ".join(row["categories"]))
        elsewhere = f"fetched from {row['where']}" if row["where"] else "yours to make"
        place = row["where"] if row["here"] else f"not here; {elsewhere}"
        table.add_row("  read from", escape(place))
        for size, found in (row["sizes"] or {}).items():
            counts = f"{found['prompts']:,} prompts"
            if found["requests"] != found["prompts"]:
                counts += f", {found['requests']:,} turns"
            table.add_row(f"  {size}", f"{counts}, sha256 {found['sha256'][:16]}")
        console.print(table)
