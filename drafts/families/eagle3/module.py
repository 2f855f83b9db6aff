"""EAGLE-3: decoder layers that draft from the target's fused low, mid and high hidden states.

Paper: arXiv 2503.01840. The forward is what vLLM computes when it serves the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drafts.nn.chain import ChainDraft, layer_packings
from drafts.nn.layers import DecoderLayer, KeysValues, LayerConfig, RMSNorm, Rotation, Steps, rotary
from drafts.nn.packing import Packing
from drafts.target.layers import UnfitLayersError


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(LayerConfig):
    """Sizes and switches of an EAGLE-3 draft; the last five are the ones vLLM reads (EAGLE-3.1)."""

    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    layer_ids: tuple[int, ...]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    logit_scale: float = 1.0


class FirstLayer(DecoderLayer):
    """The layer that takes embedding and hidden state side by side, 2d wide."""

    def __init__(self, config: Eagle3Config):
        super().__init__(config, input_size=2 * config.hidden_size)
        self.norm_before_residual = config.norm_before_residual
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, embeds: Tensor, at: Rotation, steps: Steps, packing: Packing
    ) -> tuple[Tensor, KeysValues]:
        """As a decoder layer's; embeds: as `hidden`."""
        assert self.input_layernorm is not None
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        wide = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        return self.mix(wide, residual, at, steps, packing)


class Eagle3Draft(ChainDraft):
    """The draft. Parameter names are those of the checkpoints, the first layer's `layers.0`."""

    reads = "layers"

    def __init__(self, config: Eagle3Config):
        size, eps = config.hidden_size, config.rms_norm_eps
        super().__init__(rotary(config), size, config.vocab_size, config.draft_vocab_size)
        self.config = config
        self.input_norm = RMSNorm(self.feature_size, eps) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(RMSNorm(config.target_hidden_size, eps) for _ in config.layer_ids)
            if config.fc_norm
            else None
        )
        self.fc = nn.Linear(self.feature_size, size, bias=False)
        later = [DecoderLayer(config, i) for i in range(1, config.num_layers)]
        self.layers = nn.ModuleList([FirstLayer(config), *later])
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)

    @property
    def feature_size(self) -> int:
        return len(self.config.layer_ids) * self.config.target_hidden_size

    @torch.no_grad()
    def begin_as(self, layers: Sequence[dict[str, Tensor]]) -> None:
        """Make these layers copies of a target's (tensors by Llama's names), one for one.

        `fc` then lets the last of the hidden states that are read pass as it is, so that the first
        layer gets what it knows; the embedding's half of its input stays as it was. Raises
        `UnfitLayersError` for layers of other sizes.
        """
        size = self.config.hidden_size
        if self.config.target_hidden_size != size:
            raise UnfitLayersError(
                f"its states are {self.config.target_hidden_size} wide, not {size}"
            )
        for layer, tensors in zip(self.layers, layers, strict=True):
            own = dict(layer.named_parameters())
            if isinstance(layer, FirstLayer):
                own["input_layernorm.weight"] = own["hidden_norm.weight"]
                for name in (f"self_attn.{part}_proj.weight" for part in "qkv"):
                    own[name] = own[name][:, -size:]
            for name, value in tensors.items():
                if own[name].shape != value.shape:
                    made = list(own[name].shape)
                    raise UnfitLayersError(f"its {name} is {list(value.shape)}, the draft's {made}")
                own[name].copy_(value)
        self.fc.weight[:, -size:] += torch.eye(size)

    def start(self, features: Tensor) -> Tensor:
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            chunks = features.chunk(len(self.fc_norm), dim=-1)
            pairs = zip(self.fc_norm, chunks, strict=True)
            features = torch.cat([norm(chunk) for norm, chunk in pairs], dim=-1)
        return self.fc(features)

    def decode(
        self,
        hidden: Tensor,
        embeds: Tensor,
        at: Rotation,
        caches: Sequence[Steps],
        packing: Packing,
    ) -> tuple[Tensor, Tensor, list[KeysValues]]:
        first, *later = layer_packings(caches, packing)
        out, keys_values = self.layers[0](hidden, embeds, at, caches[0], first)
        made = [keys_values]
        for layer, cache, rows in zip(self.layers[1:], caches[1:], later, strict=True):
            out, keys_values = layer(out, at, cache, rows)
            made.append(keys_values)
        normed = self.norm(out)
        return normed, normed if self.config.norm_output else out, made

    def logits(self, output: Tensor, step: int) -> Tensor:
        return self.lm_head(output) * self.config.logit_scale
