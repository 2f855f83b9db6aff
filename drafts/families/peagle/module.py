"""P-EAGLE: EAGLE-3 that drafts all its tokens in one forward pass (parallel drafting).

Step 0 is EAGLE-3's. The later steps do not wait for a drafted token: they are slots that hold a
mask token and a learned hidden state. The forward is what vLLM computes with `parallel_drafting`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drafts.families.eagle3.module import Eagle3Config, Eagle3Draft


@dataclass(frozen=True, kw_only=True)
class PEagleConfig(Eagle3Config):
    """An EAGLE-3 draft's, and the token that stands in the masked slots."""

    mask_token_id: int


class PEagleDraft(Eagle3Draft):
    """The draft. `mask_hidden` [1, feature_size] takes the place of the target's features."""

    def __init__(self, config: PEagleConfig):
        super().__init__(config)
        self.mask_token_id = config.mask_token_id
        self.mask_hidden = nn.Parameter(torch.zeros(1, self.feature_size))

    def feed(self, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.start(self.mask_hidden.flatten())
        return mask.expand_as(state), torch.full_like(tokens, self.mask_token_id)
