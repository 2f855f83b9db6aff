"""Drafts from scratch: random modules sized after their target, for training a base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from drafts.checkpoint.family import InitOptions
from drafts.errors import UserError

if TYPE_CHECKING:
    from drafts.nn.interface import Draft


def init_draft(family: str, target: Path, options: InitOptions | None = None) -> Draft:
    """A seeded random draft of `family` for `target`; its output layer starts as the target's."""
    import torch

    from drafts.registry import FAMILIES

    if family not in FAMILIES:
        raise UserError(
            f"family {family!r} is unknown", hint=f"choose one of {', '.join(sorted(FAMILIES))}"
        )
    options = options or InitOptions()
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return FAMILIES[family].fresh(target, options)
