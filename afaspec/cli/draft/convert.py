"""`afaspec convert`: write a draft in another layout of its family."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from afaspec.cli.flags import configured
from bench.records.settings import Settings


class ConvertConfig(Settings):
    """Which draft, and how it is to lie."""

    draft: str = Field(description="the draft's folder, or `embedded-draft`")
    to: str = Field(description="layout: eagle, dflash or speculators; medusa or medusa-heads")
    out: Path = Field(description="new folder for the converted draft")
    target: str | None = Field(
        None, description="target that the speculators layout names as its verifier"
    )


@configured(ConvertConfig, arguments=("draft",))
def convert(config: ConvertConfig) -> None:
    """Write DRAFT in another layout of its family; its tensors keep every byte.

    What the new layout has no place for is kept in afaspec-convert.json, so that the way back
    gives the first checkpoint again.

    [bold]Examples[/]

      afaspec convert embedded-draft --to speculators --out runs/speculators

      afaspec convert runs/speculators --to eagle --out runs/eagle
    """
    from afaspec.capture.adapted_target import open_target
    from afaspec.cli.console import console
    from afaspec.embedded.names import open_draft
    from drafts.convert import RECORD
    from drafts.convert import convert as run

    draft = open_draft(config.draft)
    target = open_target(config.target) if config.target else None
    made, out = run(draft, config.to, config.out, target), config.out
    kept = f" What it has no place for is in {RECORD}." if (out / RECORD).exists() else ""
    console.print(f"{out}: {made.family} in the layout {made.format}.{kept}", soft_wrap=True)
