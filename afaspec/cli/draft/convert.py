"""`afaspec convert`: write a draft in another layout of its family."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from afaspec.cli.flags import configured
from bench.records.settings import Settings
from drafts.errors import UserError


class ConvertConfig(Settings):
    """Which draft, and how it is to lie."""

    draft: str = Field(
        description="the draft's folder or hub id, `smollm2-draft` or `embedded-draft`"
    )
    to: str | None = Field(
        None,
        description="layout: eagle, dflash or speculators; medusa or medusa-heads (default: as it "
        "is, for pickles)",
    )
    out: Path = Field(description="new folder for the converted draft")
    target: str | None = Field(
        None,
        description="target that the speculators layout names, and whose embedding it holds",
    )


@configured(ConvertConfig, arguments=("draft",))
def convert(config: ConvertConfig) -> None:
    """Write DRAFT in another layout of its family; its tensors keep every byte.

    What the new layout has no place for is kept in afaspec-convert.json, so that the way back
    gives the first checkpoint again.

    A draft that is published as pickles alone (.bin, .pt) is written with safetensors. Pickles are
    read as tensors: none is run. So is a DFlash draft's mask_embedding.pt, which becomes a row of
    an embedding in the draft (with --target, where it has none).

    [bold]Examples[/]

      afaspec convert embedded-draft --to speculators --target embedded --out runs/speculators

      afaspec convert runs/speculators --to eagle --out runs/eagle

      afaspec convert models/EAGLE3-pickled --out models/EAGLE3
    """
    from afaspec.capture.adapted_target import open_target
    from afaspec.cli.console import console, working
    from afaspec.pairs.names import resolve_model
    from drafts.convert import RECORD, convert_pickles, place_mask_embedding
    from drafts.convert import convert as run
    from drafts.pickles import MASK_EMBEDDING, find_pickles
    from drafts.registry import read_draft

    out = config.out
    with working("converting"):
        folder = resolve_model(config.draft, pickles=True)
        target = open_target(config.target) if config.target else None
        if find_pickles(folder):
            made = convert_pickles(folder, config.to, out, target)
        elif (folder / MASK_EMBEDDING).exists():
            if config.to is not None:
                hint = "leave --to out, and convert what comes out once more"
                raise UserError(f"keeps an embedding in {MASK_EMBEDDING}", where=folder, hint=hint)
            made = place_mask_embedding(folder, out, target)
        elif config.to is None:
            hint = "give --to LAYOUT"
            raise UserError("is stored as safetensors already", where=folder, hint=hint)
        else:
            made = run(read_draft(folder), config.to, out, target)
    kept = f" What it has no place for is in {RECORD}." if (out / RECORD).exists() else ""
    console.print(f"{out}: {made.family} in the layout {made.format}.{kept}", soft_wrap=True)
