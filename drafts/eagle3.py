"""EAGLE-3: one decoder layer that drafts from the target's fused low, mid and high hidden states.

Paper: arXiv 2503.01840. The forward is what vLLM computes when it serves the checkpoint.
With tokens x and target features f (f[t] belongs to x[t]):

- step 0 at row t takes fc(f[t]) and the embedding of x[t+1] at position t, and predicts x[t+2];
- step j feeds the row's own output back in as the hidden state, with the embedding of x[t+j+1],
  at position t+j, and predicts x[t+j+2];
- step j attends to the step-0 keys of rows 0..t and to the row's own keys of steps 1..j.

So all rows of a sequence can be drafted at once (training-time test), each exactly as the server
would after accepting everything up to x[t+1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes and switches of an EAGLE-3 draft; the last five are the ones vLLM reads (EAGLE-3.1)."""

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    max_positions: int
    layer_ids: tuple[int, ...]
    rope: dict[str, Any] = field(default_factory=dict)
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    attention_bias: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    logit_scale: float = 1.0


class Attention(nn.Module):
    """Grouped-query attention over [embedding, hidden], 2d wide at its input."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        heads, kv_heads, size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, size
        wide, bias = 2 * config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(wide, heads * size, bias=bias)
        self.k_proj = nn.Linear(wide, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(wide, kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=False)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries [batch, heads, rows, head_dim] of x [batch, rows, 2d]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return _rotate(q, cos, sin)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, repeated for all heads: [batch, heads, rows, head_dim]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return _rotate(k, cos, sin), v

    def attend(self, q: Tensor, steps: list[tuple[Tensor, Tensor]], first_row: int) -> Tensor:
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
    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Eagle3Config):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        embeds: Tensor,
        cos: Tensor,
        sin: Tensor,
        steps: list[tuple[Tensor, Tensor]],
        first_row: int,
    ) -> Tensor:
        """The residual stream after the layer, [batch, rows, d]; appends its keys to `steps`.

        The given rows end at the sequence's last. Rows before `first_row` only provide keys.
        """
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        wide = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        steps.append(self.self_attn.keys_values(wide, cos, sin))
        before = hidden.shape[1] - (steps[0][0].shape[2] - first_row)
        q = self.self_attn.queries(wide[:, before:], cos[:, before:], sin[:, before:])
        mixed = self.self_attn.attend(q, steps, first_row)
        residual = residual[:, before:] + self.self_attn.o_proj(mixed)
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Eagle3Draft(nn.Module):
    """The draft. Parameter names are those of EAGLE-style checkpoints."""

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        fused = len(config.layer_ids) * config.target_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.input_norm = RMSNorm(fused, eps) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(RMSNorm(config.target_hidden_size, eps) for _ in config.layer_ids)
            if config.fc_norm
            else None
        )
        self.fc = nn.Linear(fused, size, bias=False)
        self.midlayer = DecoderLayer(config)
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(_rope_config(config))
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.empty(0, dtype=torch.long), persistent=False)
        self.set_vocabulary_map(self.d2t)

    def set_vocabulary_map(self, d2t: Tensor) -> None:
        """`d2t` [draft_vocab]: target id minus draft id. `t2d` is its inverse, -1 where absent."""
        ids = torch.arange(len(d2t), device=d2t.device) + d2t
        t2d = torch.full((self.config.vocab_size,), -1, dtype=torch.long, device=d2t.device)
        t2d[ids] = torch.arange(len(d2t), device=d2t.device)
        self.d2t, self.t2d = d2t, t2d

    def target_ids(self) -> Tensor:
        """The target id of each draft id, [draft_vocab]."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def fuse(self, features: Tensor) -> Tensor:
        """Target hidden states [..., layers*target_d] to the draft's hidden state [..., d]."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            chunks = features.chunk(len(self.fc_norm), dim=-1)
            pairs = zip(self.fc_norm, chunks, strict=True)
            features = torch.cat([norm(chunk) for norm, chunk in pairs], dim=-1)
        return self.fc(features)

    def logits(self, normed: Tensor) -> Tensor:
        """Draft-vocabulary logits [..., draft_vocab] of the outputs of `forward`."""
        return self.lm_head(normed) * self.config.logit_scale

    def forward(
        self, features: Tensor, input_ids: Tensor, steps: int, first_row: int = 0
    ) -> list[Tensor]:
        """Draft `steps` tokens after each row, the target's own tokens fed in (teacher forcing).

        features: [batch, n, layers*target_d]; input_ids: [batch, n], right-padded.
        Returns for each step j the normed outputs [batch, n-1-first_row, d] of rows first_row..n-2;
        that of row t predicts x[t+j+2]. Rows whose inputs lie beyond the sequence's end hold values
        without meaning. A prompt's rows, where nothing is drafted, cost only their keys.
        """
        hidden, outputs = self.fuse(features[:, :-1]), []
        cache: list[tuple[Tensor, Tensor]] = []
        for j in range(steps):
            tokens = F.pad(input_ids[:, j + 1 :], (0, j))[:, -hidden.shape[1] :]
            normed, hidden = self._step(hidden, tokens, j, cache, first_row)
            outputs.append(normed)
        return outputs

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        """The k tokens (target ids) that the server would draft greedily after `input_ids`.

        features: [n, layers*target_d] of x[0..n-1]; input_ids: [n+1], the last just sampled.
        """
        hidden, drafted = self.fuse(features).unsqueeze(0), []
        cache: list[tuple[Tensor, Tensor]] = []
        tokens = input_ids[1:].unsqueeze(0)
        for j in range(k):
            normed, hidden = self._step(hidden, tokens, j, cache, first_row=len(features) - 1)
            best = self.logits(normed[:, -1]).argmax(-1)
            drafted.append(int(best + self.d2t[best]))
            tokens = torch.tensor([[drafted[-1]]], device=input_ids.device)
        return drafted

    def _step(
        self,
        hidden: Tensor,
        tokens: Tensor,
        j: int,
        cache: list[tuple[Tensor, Tensor]],
        first_row: int,
    ) -> tuple[Tensor, Tensor]:
        """One draft step: normed output and state fed to step j+1, of the rows from first_row on.

        hidden and tokens cover the last rows of the sequence: all of them at step 0.
        """
        rows = cache[0][0].shape[2] if cache else hidden.shape[1]
        positions = torch.arange(rows - hidden.shape[1], rows, device=hidden.device) + j
        cos, sin = self.rotary(hidden, positions.unsqueeze(0))
        embeds = self.embed_tokens(tokens)
        out = self.midlayer(hidden, embeds, cos, sin, cache, first_row)
        normed = self.norm(out)
        return normed, normed if self.config.norm_output else out


class RMSNorm(nn.Module):
    """Root-mean-square norm with float32 statistics, returning its input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, rows, head_dim] by cos and sin [1, rows, head_dim]."""
    return (x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)).to(x.dtype)


def _rope_config(config: Eagle3Config) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_parameters=dict(config.rope) or {"rope_type": "default", "rope_theta": 10000.0},
    )
