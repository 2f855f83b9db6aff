"""Checkpoint formats, a module per draft family; `FAMILIES` is the registry of them all."""

from __future__ import annotations

from drafts.formats import eagle3
from drafts.info import Family, Source

FAMILIES: dict[str, Family] = {family.name: family for family in (eagle3.FAMILY,)}


def family_of(source: Source) -> Family | None:
    """The family whose config and tensors these are; the first that says so."""
    return next((family for family in FAMILIES.values() if family.matches(source)), None)
