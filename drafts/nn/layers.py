"""The building blocks that draft modules share, named as in their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from drafts.nn.attention import Sight, attend
from drafts.nn.packing import Packing

KeysValues = tuple[Tensor, Tensor]
Steps = Sequence[KeysValues]  # a layer's, by draft step
Rotation = tuple[Tensor, Tensor]  # cos and sin, [rows, head_dim]
INIT_STD = 0.02
ROTATES_ALIKE = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class LayerConfig:
    """Sizes and switches of a draft's Llama-like decoder layers.

    `windows` are the layers' own sliding windows in tokens, the query's included (None: no window;
    () for none at all). `target_window` is that of a target whose layers all have one: vLLM gives
    it to each of the draft's layers that has none of its own.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int
    num_layers: int = 1
    rope: dict[str, Any] = field(default_factory=dict)
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    target_window: int | None = None

    def window(self, layer: int) -> int | None:
        """How many tokens back layer number `layer` sees, itself included; None for all."""
        own = self.windows[layer] if self.windows else None
        return own or self.target_window


class RMSNorm(nn.Module):
    """Root-mean-square norm with float32 statistics, returning its input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention whose input may be wider than the hidden size.

    With a `window` of W tokens, a query at position p sees the keys at positions above p - W.
    """

    def __init__(self, config: LayerConfig, input_size: int, window: int | None = None):
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, bias = config.head_dim, config.qkv_bias
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, size
        self.window = window
        self.q_proj = nn.Linear(input_size, heads * size, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None

    def queries(self, x: Tensor, at: Rotation) -> Tensor:
        """Rotated queries [heads, rows, head_dim] of x [rows, input]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        q = self.q_norm(q) if self.q_norm is not None else q
        return _rotate(q.transpose(0, 1), at)

    def keys_values(self, x: Tensor, at: Rotation) -> KeysValues:
        """Rotated keys, and values: [kv_heads, rows, head_dim]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(0, 1)
        k = (self.k_norm(k) if self.k_norm is not None else k).transpose(0, 1)
        return _rotate(k, at), v

    def attend(self, q: Tensor, steps: Steps, packing: Packing) -> Tensor:
        """Each row attends causally to step 0 and to its own entries of the later steps.

        q: [heads, m, head_dim], of the rows of `packing`. steps[0] holds keys and values of all
        rows, steps[1:] those of the m. Returns [m, heads * size].
        """
        keys, values = steps[0]
        own = steps[1:] if self.window is None else steps[1:][-self.window :]
        sight = Sight(packing, self.window, offset=len(steps) - 1)
        mixed = attend(q.unsqueeze(2), keys, values, *stacked(own, q, keys), sight)
        return mixed.squeeze(2).transpose(0, 1).flatten(1)


class MLP(nn.Module):
    def __init__(self, config: LayerConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A Llama layer over rows that are drafted step by step, the draft's layer number `number`.

    `input_norm` is off in EAGLE's first layer, which takes its input as it is.
    """

    def __init__(
        self,
        config: LayerConfig,
        number: int = 0,
        *,
        input_size: int | None = None,
        input_norm: bool = True,
    ):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps) if input_norm else None
        self.self_attn = Attention(config, input_size or size, config.window(number))
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)

    def forward(
        self, hidden: Tensor, at: Rotation, steps: Steps, packing: Packing
    ) -> tuple[Tensor, KeysValues]:
        """The residual stream after the layer of the m rows of `packing`, [m, d], and the keys and
        values of all rows that are given.

        hidden: [n, d] at step 0, [m, d] later; `steps` are the keys and values of earlier steps.
        """
        normed = hidden if self.input_layernorm is None else self.input_layernorm(hidden)
        return self.mix(normed, hidden, at, steps, packing)

    def mix(
        self, normed: Tensor, residual: Tensor, at: Rotation, steps: Steps, packing: Packing
    ) -> tuple[Tensor, KeysValues]:
        """Attention over `normed` [rows, input] and the MLP, added to `residual`."""
        made = self.self_attn.keys_values(normed, at)
        normed, residual, cos, sin = map(packing.drafted, (normed, residual, *at))
        q = self.self_attn.queries(normed, (cos, sin))
        mixed = self.self_attn.attend(q, [*steps, made], packing)
        residual = residual + self.self_attn.o_proj(mixed)
        return residual + self.mlp(self.post_attention_layernorm(residual)), made


def stacked(own: Steps, q: Tensor, keys: Tensor) -> KeysValues:
    """The keys and values of later steps by row: [kv_heads, m, steps, head_dim]."""
    if not own:
        none = keys.new_empty(keys.shape[0], q.shape[1], 0, keys.shape[2])
        return none, none
    return torch.stack([k for k, _ in own], dim=2), torch.stack([v for _, v in own], dim=2)


def rotation(rotary: nn.Module, x: Tensor, positions: Tensor) -> Rotation:
    """cos and sin [rows, rotary size] at `positions` [rows], in the dtype of x."""
    cos, sin = rotary(x, positions.unsqueeze(0))
    return cos.squeeze(0), sin.squeeze(0)


def rotary(config: LayerConfig) -> LlamaRotaryEmbedding:
    """cos and sin [.., rotary size] for positions, of the rope kinds in `drafts.rope`.

    Three are the plain rope under other names, as in vLLM: the multimodal rope, whose sections all
    have the same position in text; the dynamic one, which vLLM does not stretch; and the partial
    one, whose size is what the draft's heads rotate.
    """
    rope = {key: value for key, value in config.rope.items() if key not in ROTATES_ALIKE}
    if rope.get("rope_type") == "dynamic":
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    size = int(config.head_dim * config.rope.get("partial_rotary_factor", 1.0))
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=size,
            num_attention_heads=1,
            head_dim=size,
            max_position_embeddings=config.max_positions,
            rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def _rotate(x: Tensor, at: Rotation) -> Tensor:
    """Rotary embedding of the first channels of x [heads, rows, head_dim]."""
    cos, sin = at
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = (turned * cos + rotate_half(turned) * sin).to(x.dtype)
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned


def init_linears(draft: nn.Module) -> None:
    """Small normal weights in every linear layer, zero biases."""
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
