"""`afaspec convert`: write a draft in another layout of its family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    draft: Annotated[
        str, typer.Argument(help="The draft's folder, or `embedded-draft`.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(help="Layout: eagle, dflash or speculators; medusa or medusa-heads."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the converted draft.")],
    target: Annotated[
        str | None, typer.Option(help="Target that the speculators layout names as its verifier.")
    ] = None,
) -> None:
    """Write DRAFT in another layout of its family; its tensors keep every byte.

    What the new layout has no place for is kept in afaspec-convert.json, so that the way back
    gives the first checkpoint again.

    [bold]Examples[/]

      afaspec convert embedded-draft --to speculators --out runs/speculators

      afaspec convert runs/speculators --to eagle --out runs/eagle
    """
    from afaspec.cli.console import console
    from afaspec.embedded.names import resolve_model
    from drafts.convert import RECORD
    from drafts.convert import convert as run
    from drafts.registry import read_draft
    from drafts.target import read_target

    made = run(
        read_draft(resolve_model(draft)),
        to,
        out,
        read_target(resolve_model(target)) if target else None,
    )
    kept = f" What it has no place for is in {RECORD}." if (out / RECORD).exists() else ""
    console.print(f"{out}: {made.family} in the layout {made.format}.{kept}", soft_wrap=True)
