"""Checkpoint formats, a module per draft family; `FAMILIES` is the registry of them all."""

from __future__ import annotations

from drafts.formats import dflash, draft_model, eagle, eagle3, medusa, peagle
from drafts.info import Family, Source

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        peagle.FAMILY,  # before EAGLE-3, whose architecture name its checkpoints may carry
        eagle3.FAMILY,
        eagle.FAMILY,
        medusa.FAMILY,
        dflash.FAMILY,
        draft_model.FAMILY,  # last: what is no draft head may still be a model of its own
    )
}


def family_of(source: Source) -> Family | None:
    """The family whose config and tensors these are; the first that says so."""
    return next((family for family in FAMILIES.values() if family.matches(source)), None)
