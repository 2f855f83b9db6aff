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
    """

    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int | None = None
    causal: tuple[bool, ...] = ()
    logit_scale: float = 1.0
    qk_norm: bool = True


class BlockAttention(Attention):
    """Attention of one block of slots a row, over the row's context and the block itself."""

    def __init__(self, config: DFlashConfig, number: int):
        super().__init__(config, config.hidden_size, config.window(number))
        self.causal = bool(config.causal) and config.causal[number]

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
        sight = Sight(packing, self.window, offset=1, own=seen)
        return attend(q, *context, *block, sight).permute(1, 2, 0, 3).flatten(2)


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
        """As `Draft.forward`: row t's slots are x[t+1] and `steps` masks, from position t+1 on.

        The slot at position t+2+j predicts x[t+2+j]; the anchor's predicts nothing.
        """
        context = self.hidden_norm(self.fc(features))
        anchors = packing.after(input_ids, packing.rows, 1)
        tokens = F.pad(anchors.unsqueeze(1), (0, steps), value=self.config.mask_token_id)
        block = self.embed_tokens(tokens)
        positions, slots = packing.positions, torch.arange(1, steps + 2, device=context.device)
        context_at = rotation(self.rotary, context, positions)
        of_slots = positions[packing.rows].unsqueeze(1) + slots
        at = rotation(self.rotary, context, of_slots.flatten())
        for layer in self.layers:
            block = self.step_of(layer, block, context, at, context_at, packing)
        return list(self.norm(block)[:, 1:].unbind(1))

    def logits(self, output: Tensor, step: int) -> Tensor:
        return self.lm_head(output) * self.config.logit_scale

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        outputs = self(features, input_ids, k, Packing.last_of(features))
        return [self.best(output, j) for j, output in enumerate(outputs)]
