"""Which of the target's layers a draft reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafts.errors import UserError


def check_layer_ids(ids: Any, path: Path, field: str) -> tuple[int, ...] | None:
    """The layer ids that a config names, None for none. Raises `UserError` for odd ones."""
    if not ids:
        return None
    if not all(isinstance(i, int) and i >= 0 for i in ids) or len(set(ids)) != len(ids):
        raise UserError(
            f"{field} is {ids}, expected distinct layer numbers",
            where=path,
            hint="write the layers that the draft was trained on",
        )
    return tuple(ids)


def parse_layer_ids(text: str) -> tuple[int, ...]:
    """The layer ids that a flag gives, such as `2,6,9`. Raises `ValueError` for odd ones."""
    parts = [part.strip() for part in text.split(",")]
    if not all(map(str.isdecimal, parts)) or len(set(parts)) != len(parts):
        raise ValueError("expected distinct layer ids, such as 2,6,9")
    return tuple(map(int, parts))


def spread_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Low, middle and high layers for a fresh draft: vLLM's default where they are distinct."""
    usual = default_layer_ids(num_layers)
    if usual[0] < usual[1] < usual[2]:
        return usual
    return tuple(sorted({1, max(num_layers // 2, 1), max(num_layers - 1, 1)}))


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """The layers vLLM takes where an EAGLE-3 draft names none: (2, L//2, L-3)."""
    return (2, num_layers // 2, num_layers - 3)
