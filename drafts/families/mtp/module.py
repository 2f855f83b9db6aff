"""MTP: a decoder layer of the target's own kind that predicts one token more (arXiv 2412.19437).

It takes the embedding of the token just known beside the target's last hidden state, and goes over
its own output for further tokens, as vLLM does with one such layer. The decoder layer is
transformers' own of the target's architecture, attending by our functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafts.nn.attention import Sight, attend
from drafts.nn.chain import ChainDraft
from drafts.nn.layers import KeysValues, Rotation, Steps, stacked
from drafts.nn.packing import Packing
from drafts.nn.transformers_attention import ours


@dataclass(frozen=True)
class MtpParts:
    """transformers' parts of one architecture: classes, and their config; `raw` as it is on disk.

    `number` is the layer's among the target's, which decides on what it is made of. `stacked` says
    whether the experts are stored as two tensors, or each by itself.
    """

    raw: dict[str, Any]
    config: Any
    layer: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]
    number: int
    stacked: bool


class Matrix(nn.Module):
    """A linear layer that gets no adapters: an expert sees few tokens, and there are many."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Expert(nn.Module):
    """One gated MLP, named as checkpoints store it."""

    def __init__(self, size: int, inner: int, activation: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj = Matrix(size, inner), Matrix(size, inner)
        self.down_proj = Matrix(inner, size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return mixed


class Experts(nn.ModuleList):
    """The routed experts one by one, in the place of transformers' stacked ones."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden [m, d]; chosen, weights [m, experts a token]: each row's experts and their say."""
        mixed = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            rows, place = torch.where(chosen == number)
            out = self[number](hidden[rows]) * weights[rows, place, None]
            mixed = mixed.index_add(0, rows, out.to(mixed.dtype))
        return mixed


class MtpDraft(ChainDraft):
    """The draft, whose embedding and output layer are the target's.

    `keeps_first`: does the first token of a text count, or is its embedding taken for zero?
    `feeds_normed`: is what goes into the next step normed, as what the output layer sees is?
    """

    reads = "final"

    def __init__(self, parts: MtpParts, *, keeps_first: bool, feeds_normed: bool):
        config = parts.config
        size, eps = config.hidden_size, config.rms_norm_eps
        super().__init__(parts.rotary(config), size, config.vocab_size, config.vocab_size)
        self.keeps_first, self.feeds_normed = keeps_first, feeds_normed
        self.parts = parts
        self.enorm, self.hnorm = parts.norm(size, eps=eps), parts.norm(size, eps=eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([parts.layer(config, parts.number)])
        if not parts.stacked:
            part_experts(self.layers)
        self.norm = parts.norm(size, eps=eps)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)

    @property
    def feature_size(self) -> int:
        size: int = self.parts.config.hidden_size
        return size

    def start(self, features: Tensor) -> Tensor:
        """The target's last hidden state itself, normed as its output layer sees it."""
        return features

    def decode(
        self,
        hidden: Tensor,
        embeds: Tensor,
        at: Rotation,
        caches: Sequence[Steps],
        packing: Packing,
    ) -> tuple[Tensor, Tensor, list[KeysValues]]:
        (earlier,) = caches
        if earlier and not len(hidden):  # transformers' layers want a row
            k, v = earlier[0]
            return hidden, hidden, [(k[:, :0], v[:, :0])]
        seen = packing if earlier else packing.whole
        made: list[KeysValues] = []

        def chained(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            """Attention to step 0 of the rows before, and to the row's own later steps."""
            made.append((k, v))
            steps = [*earlier, (k, v)]
            keys, values = steps[0]
            own = steps[1:] if window is None else steps[1:][-window:]
            sight = Sight(seen, window, offset=len(steps) - 1)
            return attend(q.unsqueeze(2), keys, values, *stacked(own, q, keys), sight).squeeze(2)

        if not earlier and not self.keeps_first:
            embeds = embeds.masked_fill((packing.positions == 0).unsqueeze(1), 0.0)
        joined = self.eh_proj(torch.cat([self.enorm(embeds), self.hnorm(hidden)], dim=-1))
        cos, sin = at
        with ours(self.parts.config):
            out = self.layers[0](
                joined.unsqueeze(0),
                position_embeddings=(cos.unsqueeze(0), sin.unsqueeze(0)),
                attention_mask=None,
                attend=chained,
            )[0]
        if not earlier:  # all rows gave keys
            out = packing.drafted(out)
        normed = self.norm(out)
        return normed, normed if self.feeds_normed else out, made

    def logits(self, output: Tensor, step: int) -> Tensor:
        logits: Tensor = self.lm_head(output)
        return logits


def part_experts(layer: nn.Module) -> None:
    """Put `Experts` in the place of every module that stacks its experts' weights."""
    for parent in list(layer.modules()):
        experts = getattr(parent, "experts", None)
        if experts is None or not hasattr(experts, "gate_up_proj"):
            continue
        count, twice, size = experts.gate_up_proj.shape
        activation = experts.act_fn
        parent.experts = Experts(Expert(size, twice // 2, activation) for _ in range(count))
