"""transformers' own layers, attending by functions of ours: packed, and linear in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "afaspec"  # among transformers' attention functions
# queries [heads, m, size], keys and values [kv_heads, m, size], and the layer's window: what
# each query mixes, [heads, m, size]. Scores are scaled by size ** -0.5.
Attend = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


@contextmanager
def ours(config: Any) -> Iterator[None]:
    """Within it the layers of `config` attend by the `attend` that their forward is given."""
    usual, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = usual


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Attend,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, heads, m, size], key and value likewise of fewer heads.

    Returns [1, m, heads, size of values]. Raises `NotImplementedError` for what `attend` cannot:
    scores that are capped, sinks, values wider than keys.
    """
    wider = query.shape[-1] - value.shape[-1]  # multi-head latent attention
    if softcap is not None or s_aux is not None or wider < 0:
        raise NotImplementedError("attention with capped scores, sinks or wide values")
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    mixed = attend(query[0], key[0], F.pad(value[0], (0, wider)), sliding_window)
    return mixed[..., : value.shape[-1]].transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
