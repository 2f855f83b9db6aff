"""Medusa: heads that each draft one further token from the target's final hidden state.

Paper: arXiv 2401.10774. The forward is what vLLM computes when it serves the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafts.errors import UserError
from drafts.nn.interface import Draft
from drafts.nn.packing import Packing


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """Sizes and switches of a Medusa draft, as vLLM reads them.

    With `shared_head` all heads end in one output layer, which stays as it is ("original").
    """

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_layers: int = 1
    bias: bool = False
    shared_head: bool = False
    logit_scale: float = 1.0


class ResidualLayer(nn.Module):
    def __init__(self, config: MedusaConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class OutputLayer(nn.Module):
    def __init__(self, config: MedusaConfig):
        super().__init__()
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class MedusaDraft(Draft):
    """The draft: head i at row t predicts x[t+i+2] from the target's final state of x[t]."""

    reads = "final"

    def __init__(self, config: MedusaConfig):
        super().__init__(config.vocab_size, config.vocab_size)
        self.config = config
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualLayer(config) for _ in range(config.num_layers)))
            for _ in range(config.num_heads)
        )
        if config.shared_head:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self.lm_heads = nn.ModuleList(OutputLayer(config) for _ in range(config.num_heads))

    @property
    def feature_size(self) -> int:
        return self.config.hidden_size

    def forward(
        self, features: Tensor, input_ids: Tensor, steps: int, packing: Packing
    ) -> list[Tensor]:
        """As `Draft.forward`. Raises `UserError` for more steps than there are heads."""
        return self._states(features[packing.rows], steps)

    def logits(self, output: Tensor, step: int) -> Tensor:
        head = self.lm_head if self.config.shared_head else self.lm_heads[step]
        return head(output) * self.config.logit_scale

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        return [self.best(state, i) for i, state in enumerate(self._states(features[-1:], k))]

    def _states(self, x: Tensor, steps: int) -> list[Tensor]:
        """What the first `steps` heads' output layers take, from features x [.., d]."""
        if steps > len(self.blocks):
            raise UserError(
                f"{steps} draft steps are asked of a Medusa draft with {len(self.blocks)} heads",
                hint=f"ask for {len(self.blocks)} or fewer",
            )
        return [self.step_of(block, x) for block in self.blocks[:steps]]
