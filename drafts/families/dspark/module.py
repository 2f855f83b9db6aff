"""DSpark: DFlash's block in one pass, then token after token through a small Markov head.

The block gives every slot logits of its own; to those of slot j comes a bias that the token before
it makes, a low-rank matrix of transitions (arXiv 2607.05147). A block holds the token just sampled
(the anchor) and masks: where the anchor is sampled from, slot s stands for the token behind it,
else a mask stands at the very place of its token, as in DFlash. The forward is what vLLM computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drafts.families.dflash.module import DFlashConfig, DFlashDraft
from drafts.nn.packing import Packing


@dataclass(frozen=True, kw_only=True)
class DSparkConfig(DFlashConfig):
    """Sizes and switches of a DSpark draft. `from_anchor`: is a token sampled from the anchor?

    `confidence` is the width that a confidence head reads, where the draft has one. vLLM asks it
    only where it verifies adaptively; here it is kept as it is.
    """

    markov_rank: int
    from_anchor: bool = True
    confidence: int | None = None


class MarkovHead(nn.Module):
    """Low-rank transitions, named as in checkpoints: from the target's tokens to the draft's."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)


class ConfidenceHead(nn.Module):
    """Kept, neither computed nor adapted."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(torch.zeros(1, width))
        self.proj.bias = nn.Parameter(torch.zeros(1))


class DSparkDraft(DFlashDraft):
    """The draft. Parameter names are those of the checkpoints.

    What `forward` gives of a step is the block's hidden state beside the embedding of the token
    before, [m, d + rank].
    """

    config: DSparkConfig

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        self.markov_head = MarkovHead(config)
        self.confidence_head = (
            None if config.confidence is None else ConfidenceHead(config.confidence)
        )

    def forward(
        self, features: Tensor, input_ids: Tensor, steps: int, packing: Packing
    ) -> list[Tensor]:
        hidden = self._sampled(features, input_ids, steps, packing)
        before = [packing.after(input_ids, packing.rows, j + 1) for j in range(steps)]
        pairs = zip(hidden, before, strict=True)
        return [torch.cat([h, self.markov_head.markov_w1(ids)], dim=-1) for h, ids in pairs]

    def _sampled(
        self, features: Tensor, input_ids: Tensor, steps: int, packing: Packing
    ) -> tuple[Tensor, ...]:
        """The block's hidden states that tokens are sampled from, [m, d] of each step."""
        if self.config.from_anchor:
            return self.block(features, input_ids, steps - 1, packing).unbind(1)
        return self.block(features, input_ids, steps, packing)[:, 1:].unbind(1)

    def logits(self, output: Tensor, step: int) -> Tensor:
        hidden, before = output.split([self.config.hidden_size, self.config.markov_rank], dim=-1)
        logits = self.lm_head(hidden) + self.markov_head.markov_w2(before)
        return logits * self.config.logit_scale

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        drafted: list[int] = []
        last = input_ids[-1:]
        for j, hidden in enumerate(
            self._sampled(features, input_ids, k, Packing.last_of(features))
        ):
            output = torch.cat([hidden, self.markov_head.markov_w1(last)], dim=-1)
            drafted.append(self.best(output, j))
            last = torch.tensor(drafted[-1:], device=input_ids.device)
        return drafted
