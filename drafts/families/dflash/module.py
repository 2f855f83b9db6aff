"""DFlash: one forward pass over a block of slots that attend to the target's fused features.

The features of all known tokens are the context: they give keys and values, never queries. The
queries are a block of the token just sampled (the anchor) and k mask tokens; each slot attends to
the context and to the whole block, or to the block's earlier slots where the draft is causal. The
forward is what vLLM computes when it serves the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafts.nn.attention import Sight, attend
from drafts.nn.interface import Draft
from drafts.nn.layers import (
    Attention,
    DecoderLayer,
    KeysValues,
    LayerConfig,
    RMSNorm,
    Rotation,
    rotary,
    rotation,
)
from drafts.nn.packing import Packing


@dataclass(frozen=True, kw_only=True)
class DFlashConfig(LayerConfig):
    """Sizes and switches of a DFlash draft. `block_size` is the anchor's slot and the masks'.

    `causal` says of each layer whether a slot sees the block's earlier slots alone; () for none.
    `sinks`: each head may attend to nothing, by a score of its own. Values are taken `value_scale`
    times.
    """

    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int | None = None
    causal: tuple[bool, ...] = ()
    sinks: bool = False
    value_scale: float = 1.0
    logit_scale: float = 1.0
    qk_norm: bool = True


class BlockAttention(Attention):
    """Attention of one block of slots a row, over the row's context and the block itself."""

    def __init__(self, config: DFlashConfig, number: int):
        super().__init__(config, config.hidden_size, config.window(number))
        self.causal = bool(config.causal) and config.causal[number]
        heads = config.num_attention_heads
        self.attention_sink_bias = nn.Parameter(torch.zeros(heads)) if config.sinks else None
        self.value_scale = config.value_scale

    def keys_values(self, x: Tensor, at: Rotation) -> KeysValues:
        k, v = super().keys_values(x, at)
        return k, v if self.value_scale == 1.0 else v * self.value_scale

    def attend_blocks(
        self, q: Tensor, context: KeysValues, block: KeysValues, packing: Packing
    ) -> Tensor:
        """Row t's slots attend to the context up to row t and to each other.

        Slot s is at position t + 1 + s. A window is as wide to the right as to the left where the
        layer is not causal, as in vLLM.

        q: [heads, m, slots, head_dim], of the rows of `packing`; the block's keys and values
        likewise and those of the context, [kv_heads, n, head_dim], of the heads for keys. Returns
        [m, slots, heads * head_dim].
        """
        slot = torch.arange(q.shape[2], device=q.device)
        apart = slot - slot.unsqueeze(1)
        seen = apart <= 0 if self.causal else torch.ones_like(apart, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (apart.abs() < self.window)
        size = q.shape[-1]
        if self.attention_sink_bias is not None:
            q, context, block = with_sinks(q, context, block, self.attention_sink_bias)
            seen = F.pad(seen, (0, 1), value=True)
        sight = Sight(packing, self.window, offset=1, own=seen)
        return attend(q, *context, *block, sight)[..., :size].permute(1, 2, 0, 3).flatten(2)


def with_sinks(
    q: Tensor, context: KeysValues, block: KeysValues, sinks: Tensor
) -> tuple[Tensor, KeysValues, KeysValues]:
    """What `BlockAttention` attends with, and one entry more a row: its score is the head's of
    `sinks` [heads], whatever the query, and its value is zero.

    Query heads of a group share their keys, so each has a channel of its own among further ones.
    Attention scales scores by the width, so queries grow with it.
    """
    heads, rows, slots, size = q.shape
    kv_heads = context[0].shape[0]
    group = heads // kv_heads
    wide = size + group
    own = torch.eye(group, dtype=q.dtype, device=q.device).repeat(kv_heads, 1)  # [heads, group]
    own = own.view(heads, 1, 1, group).expand(-1, rows, slots, -1)
    q = torch.cat([q * (wide / size) ** 0.5, own], dim=-1)
    k, v = (F.pad(entries, (0, group)) for entries in block)
    scores = (sinks.to(q.dtype) * wide**0.5).view(kv_heads, 1, 1, group)
    nothing = F.pad(scores, (size, 0)).expand(-1, rows, -1, -1)
    block = torch.cat([k, nothing], dim=2), F.pad(v, (0, 0, 0, 1))
    return q, (F.pad(context[0], (0, group)), F.pad(context[1], (0, group))), block


class BlockLayer(DecoderLayer):
    """A decoder layer whose rows are blocks of slots; the context only gives it keys."""

    self_attn: BlockAttention

    def __init__(self, config: DFlashConfig, number: int):
        super().__init__(config, number)
        self.self_attn = BlockAttention(config, number)

    def forward(  # type: ignore[override]
        self, block: Tensor, context: Tensor, at: Rotation, context_at: Rotation, packing: Packing
    ) -> Tensor:
        """The residual stream of `block` [m, slots, d] after the layer.

        context: [n, d]; `at` are the rotations of all slots, `context_at` of the context.
        """
        assert self.input_layernorm is not None
        attention, split = self.self_attn, block.shape[:2]
        normed = self.input_layernorm(block).flatten(0, 1)
        q = attention.queries(normed, at).unflatten(1, split)
        k, v = (t.unflatten(1, split) for t in attention.keys_values(normed, at))
        known = attention.keys_values(context, context_at)
        block = block + attention.o_proj(attention.attend_blocks(q, known, (k, v), packing))
        return block + self.mlp(self.post_attention_layernorm(block))


class DFlashDraft(Draft):
    """The draft. Parameter names are those of the checkpoints.

    Unless it is causal, what any slot says depends on how many there are: it drafts best with the
    k that it was trained for.
    """

    reads = "layers"

    def __init__(self, config: DFlashConfig):
        super().__init__(config.vocab_size, config.draft_vocab_size)
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.fc = nn.Linear(self.feature_size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(BlockLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.rotary = rotary(config)

    @property
    def feature_size(self) -> int:
        return len(self.config.layer_ids) * self.config.target_hidden_size

    def forward(
        self, features: Tensor, input_ids: Tensor, steps: int, packing: Packing
    ) -> list[Tensor]:
        """As `Draft.forward`: the slot at position t+2+j predicts x[t+2+j], the anchor nothing."""
        return list(self.block(features, input_ids, steps, packing)[:, 1:].unbind(1))

    def block(self, features: Tensor, input_ids: Tensor, masks: int, packing: Packing) -> Tensor:
        """The block's normed states [m, 1 + masks, d]: row t's slots are x[t+1] and the masks, from
        position t+1 on."""
        context = self.hidden_norm(self.fc(features))
        anchors = packing.after(input_ids, packing.rows, 1)
        tokens = F.pad(anchors.unsqueeze(1), (0, masks), value=self.config.mask_token_id)
        block = self.embed_tokens(tokens)
        positions, slots = packing.positions, torch.arange(1, masks + 2, device=context.device)
        context_at = rotation(self.rotary, context, positions)
        of_slots = positions[packing.rows].unsqueeze(1) + slots
        at = rotation(self.rotary, context, of_slots.flatten())
        for layer in self.layers:
            block = self.step_of(layer, block, context, at, context_at, packing)
        normed: Tensor = self.norm(block)
        return normed

    def logits(self, output: Tensor, step: int) -> Tensor:
        return self.lm_head(output) * self.config.logit_scale

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        outputs = self(features, input_ids, k, Packing.last_of(features))
        return [self.best(output, j) for j, output in enumerate(outputs)]
