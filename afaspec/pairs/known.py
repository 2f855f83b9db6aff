"""The pairs that come with afaspec: a target, its draft, and general prompts for both."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from afaspec.embedded.unpack import ASSETS
from afaspec.pairs.smollm2 import made_folder, packaged_file
from drafts.errors import UserError


@dataclass(frozen=True)
class Pair:
    """A target and its draft by name; `general` has prompts of the kinds that the draft knows."""

    target: str
    draft: str
    general: Path


SMOLLM2 = Pair("smollm2", "smollm2-draft", ASSETS / "smollm2-general.jsonl")
# The embedded draft knows Python alone.
EMBEDDED = Pair("embedded", "embedded-draft", Path(sysconfig.get_path("stdlib")))
PAIRS = {pair.target: pair for pair in (SMOLLM2, EMBEDDED)}


def best_pair() -> tuple[Pair, UserError | None]:
    """The real pair, or the embedded one and why this machine has no other."""
    try:
        if not made_folder().is_dir():
            packaged_file()
    except UserError as error:
        return EMBEDDED, error
    return SMOLLM2, None
