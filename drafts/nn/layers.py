"""The building blocks that draft modules share, named as in their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

KeysValues = tuple[Tensor, Tensor]
Steps = list[KeysValues]  # a layer's, by draft step
Rotation = tuple[Tensor, Tensor]  # cos and sin, [1, rows, head_dim]
INIT_STD = 0.02


@dataclass(frozen=True)
class LayerConfig:
    """Sizes and switches of a draft's Llama-like decoder layers."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int
    num_layers: int = 1
    rope: dict[str, Any] = field(default_factory=dict)
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    attention_bias: bool = False
    qk_norm: bool = False


class RMSNorm(nn.Module):
    """Root-mean-square norm with float32 statistics, returning its input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention whose input may be wider than the hidden size."""

    def __init__(self, config: LayerConfig, input_size: int):
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, bias = config.head_dim, config.attention_bias
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, size
        self.q_proj = nn.Linear(input_size, heads * size, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None

    def queries(self, x: Tensor, at: Rotation) -> Tensor:
        """Rotated queries [batch, heads, rows, head_dim] of x [batch, rows, input]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        q = self.q_norm(q) if self.q_norm is not None else q
        return _rotate(q.transpose(1, 2), at)

    def keys_values(self, x: Tensor, at: Rotation) -> KeysValues:
        """Rotated keys, and values, repeated for all heads: [batch, heads, rows, head_dim]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        k = (self.k_norm(k) if self.k_norm is not None else k).transpose(1, 2)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return _rotate(k, at), v

    def attend(self, q: Tensor, steps: Steps, first_row: int) -> Tensor:
        """Each row attends causally to step 0 and to its own entries of the later steps.

        q: [batch, heads, rows, head_dim], rows first_row.. of the sequence. steps[0] holds keys and
        values of all rows, steps[1:] those of the query rows. Returns [batch, rows, heads * size].
        """
        keys, values = steps[0]
        if len(steps) == 1 and q.shape[2] == keys.shape[2]:
            mixed = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
            return mixed.transpose(1, 2).flatten(2)
        scale = self.head_dim**-0.5
        row = torch.arange(first_row, first_row + q.shape[2], device=q.device)
        future = torch.arange(keys.shape[2], device=q.device) > row.unsqueeze(1)
        scores = [(q @ keys.transpose(2, 3) * scale).masked_fill(future, float("-inf"))]
        scores += [(q * k).sum(-1, keepdim=True) * scale for k, _ in steps[1:]]
        weights = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.float32).to(values.dtype)
        mixed = weights[..., : keys.shape[2]] @ values
        for i, (_, v) in enumerate(steps[1:]):
            mixed = mixed + weights[..., keys.shape[2] + i, None] * v
        return mixed.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, config: LayerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A Llama layer over rows that are drafted step by step.

    `input_norm` is off in EAGLE's first layer, which takes its input as it is.
    """

    def __init__(
        self, config: LayerConfig, *, input_size: int | None = None, input_norm: bool = True
    ):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps) if input_norm else None
        self.self_attn = Attention(config, input_size or size)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, at: Rotation, steps: Steps, first_row: int) -> Tensor:
        """The residual stream after the layer, [batch, rows, d]; appends its keys to `steps`.

        The given rows end at the sequence's last. Rows before `first_row` only provide keys.
        """
        normed = hidden if self.input_layernorm is None else self.input_layernorm(hidden)
        return self.mix(normed, hidden, at, steps, first_row)

    def mix(
        self, normed: Tensor, residual: Tensor, at: Rotation, steps: Steps, first_row: int
    ) -> Tensor:
        """Attention over `normed` [batch, rows, input] and the MLP, added to `residual`."""
        steps.append(self.self_attn.keys_values(normed, at))
        before = normed.shape[1] - (steps[0][0].shape[2] - first_row)
        cos, sin = at
        q = self.self_attn.queries(normed[:, before:], (cos[:, before:], sin[:, before:]))
        mixed = self.self_attn.attend(q, steps, first_row)
        residual = residual[:, before:] + self.self_attn.o_proj(mixed)
        return residual + self.mlp(self.post_attention_layernorm(residual))


def rotary(config: LayerConfig) -> LlamaRotaryEmbedding:
    """cos and sin for positions, of any rope that transformers knows."""
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
            rope_parameters=dict(config.rope) or {"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def _rotate(x: Tensor, at: Rotation) -> Tensor:
    """Rotary embedding of x [batch, heads, rows, head_dim]."""
    cos, sin = at
    return (x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)).to(x.dtype)


def init_linears(draft: nn.Module) -> None:
    """Small normal weights in every linear layer, zero biases."""
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
