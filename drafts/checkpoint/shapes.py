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
    optional: Iterable[str],
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


def check_fused(
    source: Source,
    names: dict[str, Any],
    flat: dict[str, Any],
    own: dict[str, tuple[int | None, ...]],
) -> None:
    """As `check_shapes`, of a draft that reads several layers of the target.

    `own` are the tensors and sizes that its family adds. A reduced vocabulary needs its map.
    """
    size, inner = flat["hidden_size"], flat["intermediate_size"]
    layers = range(flat.get("num_hidden_layers", 1))
    expected: dict[str, tuple[int | None, ...]] = {
        **own,
        **{f"layers.{i}.mlp.down_proj.weight": (size, inner) for i in layers},
        "norm.weight": (size,),
        "lm_head.weight": (flat["draft_vocab_size"], size),
        "embed_tokens.weight": (flat["vocab_size"], size),
    }
    reduced = flat["draft_vocab_size"] != flat["vocab_size"]
    optional = ["embed_tokens.weight", *([] if reduced else ["lm_head.weight"])]
    check_shapes(source, names, expected, optional)
    if reduced and "d2t" not in names:
        raise UserError(
            "has a reduced vocabulary but no d2t tensor that maps it",
            where=source.folder,
            hint=FETCH,
        )
