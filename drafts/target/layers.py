"""A target's own decoder layers, for drafts whose layers begin as copies of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from drafts.errors import UserError
from drafts.target.info import TargetInfo
from drafts.tensors import FLOATS, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
LLAMA = {"input_layernorm.weight", "post_attention_layernorm.weight", *ATTENTION, *MLP}
OF_TEXT = re.compile(r"(?:(?:model|language_model|text_model)\.)*layers\.(\d+)\.(.+)")


class UnfitLayersError(UserError):
    """A target's layers cannot be those of a draft."""


def load_last_layers(target: TargetInfo, count: int) -> list[dict[str, Tensor]]:
    """The target's last `count` decoder layers, tensors by Llama's names.

    Raises `UnfitLayersError` for layers of another kind: what a draft's layer lacks (biases, norms
    of queries and keys) cannot be left out of a copy that is to do the same.
    """
    tensors = open_tensors(target.folder)
    layers: dict[int, dict[str, str]] = {}
    for name in tensors.headers:
        if found := OF_TEXT.fullmatch(name):
            layers.setdefault(int(found[1]), {})[found[2]] = name
    if len(layers) < count:
        raise UnfitLayersError(
            f"has {len(layers)} decoder layers of names that afaspec knows, {count} are wanted",
            where=target.folder,
        )
    last = [layers[i] for i in sorted(layers)[-count:]]
    for parts in last:
        if parts.keys() != LLAMA:
            odd = sorted(parts.keys() ^ LLAMA)
            raise UnfitLayersError(
                f"its layers are not of Llama's kind: {', '.join(odd[:3])} "
                f"{'is' if len(odd) == 1 else 'are'} there or missing",
                where=target.folder,
            )
        for name in parts.values():
            if (dtype := tensors.headers[name].dtype) not in FLOATS:
                raise UnfitLayersError(f"{name} is of type {dtype}", where=target.folder)
    return [{part: tensors.load(name) for part, name in parts.items()} for parts in last]
