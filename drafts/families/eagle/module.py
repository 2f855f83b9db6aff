"""EAGLE: decoder layers that draft from the target's final hidden state.

Paper: arXiv 2401.15077. The forward is what vLLM computes when it serves the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drafts.nn.chain import ChainDraft, layer_packings
from drafts.nn.layers import DecoderLayer, KeysValues, LayerConfig, Rotation, Steps, rotary
from drafts.nn.packing import Packing


@dataclass(frozen=True, kw_only=True)
class EagleConfig(LayerConfig):
    """Sizes of an EAGLE draft, whose vocabulary and width are the target's."""

    vocab_size: int
    logit_scale: float = 1.0


class EagleDraft(ChainDraft):
    """The draft. Parameter names are those of the checkpoints; lm_head is always the target's."""

    reads = "final"

    def __init__(self, config: EagleConfig):
        size, vocabulary = config.hidden_size, config.vocab_size
        super().__init__(rotary(config), size, vocabulary, vocabulary)
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, input_norm=i > 0) for i in range(config.num_layers)
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def feature_size(self) -> int:
        return self.config.hidden_size

    def start(self, features: Tensor) -> Tensor:
        """The features themselves: `fc` fuses them, and what is fed back, with the embedding."""
        return features

    def decode(
        self,
        hidden: Tensor,
        embeds: Tensor,
        at: Rotation,
        caches: Sequence[Steps],
        packing: Packing,
    ) -> tuple[Tensor, Tensor, list[KeysValues]]:
        out, made = self.fc(torch.cat([embeds, hidden], dim=-1)), []
        packings = layer_packings(caches, packing)
        for layer, cache, rows in zip(self.layers, caches, packings, strict=True):
            out, keys_values = layer(out, at, cache, rows)
            made.append(keys_values)
        return out, out, made  # there is no final norm

    def logits(self, output: Tensor, step: int) -> Tensor:
        return self.lm_head(output) * self.config.logit_scale
