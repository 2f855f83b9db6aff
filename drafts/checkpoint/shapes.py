"""Stored tensors held against the sizes that the config promises."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from drafts.checkpoint.source import FETCH, Source
from drafts.errors import UserError


def check_shapes(
    source: Source,
    names: dict[str, Any],
    expected: dict[str, tuple[int | None, ...]],
    optional: Iterable[str] = ("embed_tokens.weight", "lm_head.weight"),
) -> None:
    """The sizes that the config promises (None: any) are those of the stored tensors.

    `names` holds the headers by module name. Raises `UserError` for the first that is not.
    """
    for name, shape in expected.items():
        if name not in names:
            if name in optional:
                continue
            raise UserError(f"lacks the tensor {name}", where=source.folder, hint=FETCH)
        found = names[name].shape
        if len(found) != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, found, strict=True)
        ):
            raise UserError(
                f"{name} is {list(found)}, the config says {list(shape)}",
                where=source.folder,
                hint=FETCH,
            )


def down_projections(flat: dict[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """The expected shape of each decoder layer's last matrix, by module name."""
    shape = (flat["hidden_size"], flat["intermediate_size"])
    count = flat.get("num_hidden_layers", 1)
    return {f"layers.{i}.mlp.down_proj.weight": shape for i in range(count)}
